"""The bench's checkpoint has the size of the model whose widths it takes."""

from benchmarks.merge import _shapes, layers_for


def test_seven_billion_weights_make_the_layers_of_llama_2_7b() -> None:
    assert layers_for(6.74e9) == 32
    shapes = [shape for tensors in _shapes(32).values() for shape in tensors.values()]
    assert (
        sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) == 6_738_415_616
    )  # Meta's count of Llama 2 7B
