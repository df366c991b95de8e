"""What sums tensors of a CPU and of a GPU; the error of a group without the first is provoked here."""

import pytest
import torch
from torch import distributed

from finetune.launch import ranks
from finetune.launch.gradients import all_reduce_gradients


def test_a_group_for_a_gpu_sums_on_a_cpu_too() -> None:
    """With NCCL alone every flag, which is a tensor on the CPU, ended the launch after its first step."""
    from torch.distributed.distributed_c10d import Backend, BackendConfig

    assert BackendConfig(Backend(ranks.GROUP_BACKENDS["cuda"])).get_device_backend_map() == {
        "cpu": "gloo",
        "cuda": "nccl",
    }
    for backend, fails in (("cuda:gloo", True), ("cpu:gloo,cuda:gloo", False)):  # gloo stands in for NCCL
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        try:
            if fails:
                with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
                    all_reduce_gradients([], [1.0])
            else:
                assert all_reduce_gradients([], [1.0, 2.0]) == [1.0, 2.0]
                assert torch.equal(_sum(torch.ones(3)), torch.ones(3))
        finally:
            distributed.destroy_process_group()


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(tensor)
    return tensor
