"""States and batches as safetensors: no pickle, so opening a stranger's run runs no code."""

import hashlib
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map

from whence.errors import BadBatch
from whence.replay.state import State
from whence.task import Batch
from whence.tree import Tree


def pack_state(state: State) -> bytes:
    """A state as the bytes of a safetensors file."""
    named = {f"param:{name}": tensor for name, tensor in state.params.items()}
    named |= {f"buffer:{name}": tensor for name, tensor in state.buffers.items()}
    named |= {f"moment:{key}:{name}": m for name, tree in state.moments.items() for key, m in tree.items()}
    return save({name: tensor.detach().contiguous() for name, tensor in named.items()})


def unpack_state(content: bytes) -> State:
    """The state that `pack_state` wrote."""
    state = State({}, {}, {})
    for label, tensor in load(content).items():
        kind, _, name = label.partition(":")
        match kind:
            case "param":
                state.params[name] = tensor
            case "buffer":
                state.buffers[name] = tensor
            case _:
                key, _, name = name.partition(":")
                state.moments.setdefault(name, {})[key] = tensor
    return state


def pack_batches(batches: tuple[Batch, ...]) -> bytes:
    """The batches of one step, nested tuples, lists and dicts of tensors and plain values, as safetensors bytes.

    Raises:
        BadBatch: a batch holds something else.
    """
    tensors: Tree = {}

    def describe(value: Any) -> Any:
        match value:
            case Tensor():
                tensors[str(len(tensors))] = value.detach().contiguous()
                return {"tensor": len(tensors) - 1}
            case dict():
                return {"dict": {key: describe(item) for key, item in value.items()}}
            case tuple() | list():
                return {type(value).__name__: [describe(item) for item in value]}
            case None | bool() | int() | float() | str():
                return {"plain": value}
        raise BadBatch(type(value).__name__)

    structure = json.dumps([describe(batch) for batch in batches])
    return save(tensors | {"structure": torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)})


def unpack_batches(content: bytes) -> tuple[Batch, ...]:
    """The batches that `pack_batches` wrote."""
    tensors = load(content)
    structure = bytes(tensors["structure"].numpy())

    def build(described: dict[str, Any]) -> Any:
        ((kind, value),) = described.items()
        match kind:
            case "tensor":
                return tensors[str(value)]
            case "dict":
                return {key: build(item) for key, item in value.items()}
            case "plain":
                return value
        return (tuple if kind == "tuple" else list)(build(item) for item in value)

    return tuple(build(described) for described in json.loads(structure))


def digest(batch: Batch) -> str:
    """Content hash of a batch: its structure, and dtype, shape and bytes of every tensor.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1))
    True
    """
    found = hashlib.blake2b(digest_size=8)
    for path, leaf in tree_flatten_with_path(batch)[0]:
        found.update(str(path).encode())
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(_bytes(leaf))
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes | memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def copied(batch: Batch) -> Batch:
    """A batch that later changes in place cannot reach."""
    return tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, batch)
