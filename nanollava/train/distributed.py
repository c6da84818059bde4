"""Several processes, one for each GPU, train one model: what ``torchrun --nproc-per-node N train.py ...`` starts.

Each holds a share of every weight but the frozen tower's, of every gradient and optimizer state (FSDP2: Zhao et al.,
2023; PyTorch's fully_shard) and takes its share of the rows of a step. Losses and results are those of one process.
Without torchrun everything here does nothing.

    one step        process 0                                process 1
    rows            0, 2, 4, ... of those packed alike       1, 3, 5, ...
    a block         gathers the other half, computes, drops it; the same here
    loss            of its own targets / targets of both     of its own targets / targets of both
    gradients       summed over both, each keeps its half
    optimizer       its half of the weights                  its half of the weights

``full``: a whole tensor, here; ``gathered``: whole tensors in the first process's ordinary memory; ``whole``: the model
of them; ``local``: this process's share.

Weights, gradients and states travel by nccl on CUDA and by gloo on a CPU, the few numbers of a step always by gloo.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from nanollava.conversation import IGNORE
from nanollava.error import Error, first_line
from nanollava.llava import NO_PATCH, Batch, Llava

PATIENCE = timedelta(hours=1)  # others wait so long while the first one writes a checkpoint
GRACE = 10.0  # seconds in which the first process, if it met the same mistake, is the one that tells of it
NO_ROWS = Batch(
    token_ids=torch.zeros(1, 64, dtype=torch.long),
    labels=torch.full((1, 64), IGNORE),
    patches=torch.full((1, 64), NO_PATCH),
    positions=torch.zeros(1, 64, dtype=torch.long),
    documents=torch.full((1, 64), -1),
    branches=torch.zeros(1, 64, dtype=torch.long),
    pixels=None,
)


def processes() -> int:
    """How many train together."""
    return told("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process among them; 0 prints, and writes the folder."""
    return told("RANK", 0) if processes() > 1 else 0


def told(name: str, default: int) -> int:
    """A number that torchrun leaves in the environment. Raises Error for something else."""
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError as error:
        raise Error(f"{name} is {value} in the environment, but torchrun sets it to a number; unset it") from error


# ---------------------------------------------------------------- beginning and end


def hush() -> None:
    """What all processes would print alike, the first one prints."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def let_tell() -> None:
    """From here on what a process says on stderr is news of its own: pictures that it found damaged."""
    if rank():
        sys.stderr = sys.__stderr__


def join(asked: str) -> str:
    """Meet the other processes; the device on which this one computes. Raises Error where they cannot be found, or
    there are fewer GPUs than processes."""
    if processes() == 1:
        return asked
    kind, backend = asked.partition(":")[0], "gloo"
    if kind not in ("cpu", "cuda"):
        raise Error(
            f"--device {asked}: several processes train on cuda or on cpu; choose one, or start without torchrun"
        )
    if kind == "cuda" and torch.cuda.is_available():
        local, found = told("LOCAL_RANK", rank()), torch.cuda.device_count()
        if local >= found:
            raise Error(f"{local + 1} processes or more on a machine of {found} GPUs: say --nproc-per-node {found}")
        asked, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(asked)
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise Error(
                f"the processes do not find each other ({first_line(error)}); start them by torchrun"
            ) from error
    return asked


def leave() -> None:
    """Part when all have come to the end."""
    if processes() > 1:
        summed(0)
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process, under torchrun without tearing PyTorch down: on a busy machine threads of gloo that outlive
    their group now and then abort a process there, after all was saved, and torchrun takes the run for failed."""
    if "WORLD_SIZE" in os.environ:  # also where processes() could not read it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def may_tell(lost: bool = False) -> bool:
    """Whether it is for this process to tell of its mistake: one of all, the first one if it met the same; or that
    another one was ``lost`` which told nothing."""
    if processes() == 1:
        return True
    if lost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to end this one too
    elif rank():
        time.sleep(GRACE)  # torchrun ends the others as soon as one has ended
    let_tell()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank(), processes(), timeout=timedelta(seconds=GRACE)))
        return store.add("mistakes", 1) == 1
    except (ValueError, RuntimeError):  # nobody left to ask
        return True


def lost_partner(error: Exception) -> bool:
    """Whether another process ended in the middle of what all do together: gloo and nccl say it their way."""
    said = ("by peer", "Broken pipe", "remote process exit")
    return processes() > 1 and isinstance(error, RuntimeError) and any(words in str(error) for words in said)


# ---------------------------------------------------------------- a step


def summed(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    if processes() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def union(names: set[str]) -> set[str]:
    """What is in the set of any process."""
    if processes() == 1:
        return names
    sets = [set()] * processes()
    dist.all_gather_object(sets, names)
    return set().union(*sets)


def level(batches: list[Batch]) -> list[Batch]:
    """The same number of micro-batches for all, some of them without a row: who computes nothing still has to give its
    share of every weight, or the others wait for ever."""
    if processes() == 1:
        return batches
    most = torch.tensor(len(batches))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [NO_ROWS] * (int(most) - len(batches))


# ---------------------------------------------------------------- shares


def shard(model: Llava, device: torch.device) -> None:
    """Leave each process its share of every weight, on its device: cut block by block, then all the rest. The frozen
    tower stays as it is, whole: each step would gather it anyway, and the loader may ask it at any time."""
    if processes() == 1:
        return
    for p in model.projector.parameters():  # made at random, or computed: the first one's holds
        dist.broadcast(p.data, 0)
    mesh = init_device_mesh(device.type, (processes(),))
    for block in model.language.layers:
        fully_shard(block, mesh=mesh)
    reach_all(model)
    fully_shard(model, mesh=mesh, ignored_params=set(model.vision.parameters()))
    register_fsdp_forward_method(model, "loss")


def reach_all(model: Llava) -> None:
    """What enters the decoder depends on the projector also where a process has no image, as it does in the others:
    gradients are reduced in the same order everywhere only if backward goes the same way. And gradients become larger
    by the number of processes, for FSDP takes their mean, and we their sum."""
    embed, loss = model.embed, model.loss

    def reached(token_ids: Tensor, patches: Tensor, pixels: Tensor | None) -> Tensor:
        words, weight = embed(token_ids, patches, pixels), next(model.projector.parameters())
        nothing = model.projector(torch.zeros(1, weight.shape[1], device=weight.device, dtype=weight.dtype))
        return words + 0 * nothing.sum().to(words.dtype)

    def enlarged(batch: Batch) -> Tensor:
        total = loss(batch)
        if total.requires_grad:
            total.register_hook(lambda gradient: gradient * processes())
        return total

    model.embed, model.loss = reached, enlarged


def idle(model: Llava, batches: list[Batch]) -> frozenset[nn.Parameter]:
    """What is to have no gradient in this step, as in a run of one process: the projector's weights if no process has
    an image. The zeros that reach_all gives them would let their momentum move them."""
    if processes() == 1:
        return frozenset()
    (images,) = summed(sum(bool((batch.patches != NO_PATCH).any()) for batch in batches))
    return frozenset() if images else frozenset(model.projector.parameters())


def whole(model: Llava, blank: Llava) -> Llava:
    """``blank``, a model like this one without numbers, with its weights, gathered, in ordinary memory, at the first
    process; as it was elsewhere."""
    tensors = gathered(model.state_dict())
    if rank() == 0:
        blank.load_state_dict(tensors, assign=True)
    return blank


def gathered(state: object) -> object:
    """Dictionaries and lists of tensors with all shares put together, one tensor after the other, in ordinary memory;
    None for the tensors at other processes than the first."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if rank() == 0 else None


def share_of(full: Tensor, place: Tensor) -> Tensor:
    """A whole tensor cut as the one that it is for; itself where that is whole."""
    if not isinstance(place, DTensor):
        return full
    return distribute_tensor(full.to(place.device, place.dtype), place.device_mesh, place.placements)


def share_of_states(saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict with what is as large as its weight cut as the weight is."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(value: object, weight: nn.Parameter) -> object:
        return share_of(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value

    states = saved["state"].items()
    return saved | {"state": {i: {name: cut(x, weights[i]) for name, x in state.items()} for i, state in states}}


def local(x: Tensor) -> Tensor:
    """This process's share of a tensor, or all of it where it is not cut; the same memory."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def full(x: Tensor) -> Tensor:
    """The whole tensor, at all processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x
