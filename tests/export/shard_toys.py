"""Sharded training checkpoints as accelerate and torch write them, made in one process or in two."""

import multiprocessing
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def write_shards(directory: Path, tensors, files=2) -> Path:
    """Write a distributed checkpoint in one process, over several files, nested as accelerate nests it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(directory, thread_count=files)
        dcp.save({"model": dict(tensors)}, storage_writer=writer, no_dist=True)
    return directory


def write_split_shards(directory: Path, tensors) -> Path:
    """Write a distributed checkpoint from two processes, each of which has half the rows of every matrix."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, directory, tensors)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return directory


def _rank(rank: int, directory: Path, tensors) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    store = directory.with_name(f"{directory.name}-store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    kind = {True: Shard(0), False: Replicate()}
    split = {name: distribute_tensor(t, mesh, [kind[t.dim() > 1]]) for name, t in tensors.items()}
    dcp.save({"model": split}, checkpoint_id=directory)
    dist.destroy_process_group()
