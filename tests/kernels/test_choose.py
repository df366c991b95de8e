"""A pure function of wishes and facts: what it takes, why, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest

from finetune.errors import HardwareError
from finetune.kernels.choose import CACHE_SHARE, KernelChoice, KernelFacts, choose
from finetune.trainable import require_same_rounding
from tests.kernels.helpers import kernels_config

GOOD = KernelFacts(
    fusion_obstacle=None,
    quantized=True,
    dense_bytes=10,
    free_bytes=1000,
    head_split_obstacle=None,
    native_obstacle=None,
    tiles=True,
)
PLAIN = {
    "layers": "plain",
    "weights": "quantized",
    "loss": "all",
    "implementation": "plain",
    "attention": "masked",
    "memory": "plain",
}


def made(*, device: str = "cpu", wishes: dict[str, str] | None = None, **facts: Any) -> KernelChoice:
    return choose(kernels_config(**{"memory": "auto", **(wishes or {})}), replace(GOOD, **facts), device=device)


def reason(choice: KernelChoice, key: str) -> str:
    (found,) = [sentence for sentence in choice.reasons if sentence.startswith(key)]
    return found


def test_everything_is_taken_where_nothing_stands_in_the_way() -> None:
    choice = made()
    assert (
        choice.fused,
        choice.cached,
        choice.loss_on_trained_tokens,
        choice.native,
        choice.tiles,
        choice.tune_malloc,
    ) == (True,) * 6
    assert len(choice.reasons) == 6
    assert reason(choice, "implementation").endswith("attention in AMX tiles")


def test_plain_wishes_take_nothing_and_name_themselves() -> None:
    choice = made(wishes=PLAIN)
    assert (
        choice.fused,
        choice.cached,
        choice.loss_on_trained_tokens,
        choice.native,
        choice.tiles,
        choice.tune_malloc,
    ) == (False,) * 6
    assert [sentence.rpartition(": ")[2] for sentence in choice.reasons] == [
        f"as set by kernels.{key}" for key in PLAIN
    ]


@pytest.mark.parametrize(
    ("facts", "attribute", "sentence"),
    [
        ({"fusion_obstacle": "it is odd"}, "fused", "layers plain: it is odd"),
        ({"fusion_obstacle": "it is odd"}, "cached", "weights quantized: layers are plain"),
        ({"fusion_obstacle": "it is odd", "quantized": False}, "cached", "weights as loaded: layers are plain"),
        (
            {"dense_bytes": 251},
            "cached",
            "weights quantized: dense copies would take more than 25% of the free memory",
        ),
        ({"head_split_obstacle": "its head is odd"}, "loss_on_trained_tokens", "loss on all tokens: its head is odd"),
        ({"native_obstacle": "no g++"}, "native", "implementation plain: no g++"),
        (
            {"fusion_obstacle": "odd", "head_split_obstacle": "odd"},
            "native",
            "implementation plain: layers and loss are plain",
        ),
        ({"tiles": False}, "tiles", "implementation native: one pass over memory each"),
        ({"native_obstacle": "no g++"}, "tiles", "implementation plain: no g++"),
    ],
)
def test_obstacle_takes_the_plain_form_with_its_reason(facts: dict[str, Any], attribute: str, sentence: str) -> None:
    choice = made(**facts)
    assert getattr(made(), attribute)
    assert not getattr(choice, attribute)
    assert reason(choice, sentence.split()[0]) == sentence


def test_kernels_serve_the_loss_where_layers_are_plain_but_not_attention() -> None:
    choice = made(fusion_obstacle="it is odd")
    assert choice.native
    assert not choice.tiles


def test_kernels_serve_layers_where_the_loss_is_not_split() -> None:
    choice = made(head_split_obstacle="its head is odd")
    assert choice.native
    assert choice.tiles


@pytest.mark.parametrize(
    ("device", "wish", "facts", "implementation", "sentence"),
    [
        ("cuda", "auto", {"native_obstacle": "for a CPU"}, "compiled", "one pass over memory each"),
        ("cuda", "auto", {"compiled_obstacle": "no Triton"}, "plain", "no Triton"),
        ("cuda", "plain", {}, "plain", "as set by kernels.implementation"),
        ("cpu", "auto", {"native_obstacle": "no g++"}, "plain", "no g++"),
        ("cpu", "compiled", {}, "compiled", "as set by kernels.implementation"),
    ],
)
def test_torch_compiles_on_gpus_and_where_it_is_asked_to(
    device: str, wish: str, facts: dict[str, Any], implementation: str, sentence: str
) -> None:
    choice = made(device=device, wishes={"implementation": wish}, **facts)
    assert (choice.implementation, choice.tiles) == (implementation, False)
    assert reason(choice, "implementation") == f"implementation {implementation}: {sentence}"


def test_copies_are_kept_up_to_the_share_and_not_beyond() -> None:
    limit = int(CACHE_SHARE * GOOD.free_bytes)
    assert made(dense_bytes=limit).cached
    assert not made(dense_bytes=limit + 1).cached


def test_weights_that_are_dense_anyway_need_no_room() -> None:
    assert made(dense_bytes=900, quantized=False).cached


def test_a_wish_for_copies_outweighs_crowded_memory() -> None:
    choice = made(dense_bytes=900, wishes={"weights": "cached"})
    assert choice.cached
    assert reason(choice, "weights") == "weights cached: as set by kernels.weights"


def test_memory_is_kept_on_a_cpu_only() -> None:
    choice = made(device="cuda")
    assert not choice.tune_malloc
    assert reason(choice, "memory") == "memory plain: torch has its own allocator on cuda"


@pytest.mark.parametrize(
    ("wishes", "facts", "message"),
    [
        (
            {"layers": "fused"},
            {"fusion_obstacle": "it is odd"},
            r"kernels\.layers=fused is not possible here: it is odd; use kernels\.layers=auto",
        ),
        (
            {"weights": "cached"},
            {"fusion_obstacle": "it is odd"},
            r"kernels\.weights=cached is not possible here: layers are plain",
        ),
        (
            {"loss": "trained"},
            {"head_split_obstacle": "its head is odd"},
            r"kernels\.loss=trained is not possible here: its head is odd",
        ),
        (
            {"implementation": "native"},
            {"native_obstacle": "no g++"},
            r"kernels\.implementation=native is not possible here: no g\+\+",
        ),
        (
            {"implementation": "native"},
            {"fusion_obstacle": "odd", "head_split_obstacle": "odd"},
            r"kernels\.implementation=native .*: layers and loss are plain",
        ),
        (
            {"implementation": "compiled"},
            {"compiled_obstacle": "torch cannot compile here"},
            r"kernels\.implementation=compiled is not possible here: torch cannot compile here",
        ),
        (
            {"memory": "kept"},
            {"device": "cuda"},
            r"kernels\.memory=kept is not possible here: torch has its own allocator on cuda",
        ),
    ],
)
def test_wish_that_cannot_be_fulfilled_stops_the_run(
    wishes: dict[str, str], facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(HardwareError, match=message):
        made(wishes=wishes, **facts)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", "fused"), ("weights", "cached"), ("loss", "trained"), ("implementation", "native"), ("memory", "kept")],
)
def test_wish_that_can_be_fulfilled_is_named_as_the_reason(key: str, value: str) -> None:
    choice = made(wishes={key: value})
    assert f"as set by kernels.{key}" in reason(choice, key)


def test_run_that_would_continue_with_other_rounding_is_refused() -> None:
    begun = {"product": {"rounding": made().rounding()}}
    require_same_rounding(made(), begun)
    require_same_rounding(made(), None)
    with pytest.raises(HardwareError, match=r"implementation was native and is plain.*no C\+\+ compiler"):
        require_same_rounding(made(native_obstacle="there is no C++ compiler (g++)"), begun)
