# SPDX-License-Identifier: Apache-2.0
"""Quantised models as folders of safetensors, in the formats of other tools.

`load_quantized` reads what GPTQModel, AutoGPTQ, AutoAWQ and compressed-tensors wrote, into a
transformers model or into any module; `save_quantized` writes what they, and the servers that read
theirs, load. transformers' own `from_pretrained` does it too after `enable_transformers()`.

A layer is quantised if its file has the words of its weight; the folder's config.json says how to
read them. Every tensor is checked, and errors name it and its file. Nothing is unpickled.
"""

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchery._core.state import atomic_write
from batchery._core.validate import import_extra, integer, one_of, require, require_type
from batchery.compress.quant.conv1d import TransposedLinear, linear_weight
from batchery.compress.quant.digests import digests_of
from batchery.compress.quant.experts import layers_in_model, name_in_files, name_in_model
from batchery.compress.quant.folder import CONFIG, INDEX, OLD_CONFIG, WHOLE, SafetensorsFolder
from batchery.compress.quant.linear import QuantLinear
from batchery.compress.quant.scheme import FORMATS, NAMES, Format, Scheme, layers_of
from batchery.compress.quant.weight import all_finite

__all__ = ["load_quantized", "quantized_state_dict", "save_quantized"]

SHARD_BYTES = 5_000_000_000


def load_quantized(
    model_or_path: nn.Module | str | Path,
    *,
    into: nn.Module | None = None,
    format: Format | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """Make a model whose quantised layers are `QuantLinear`.

    Args:
        model_or_path: a folder with safetensors and config.json. Or a model with layers of
            another tool that hold its tensors (`qweight` and so on): they are replaced in place.
        into: module that gets the weights, its `nn.Linear` and `Conv1D` replaced where they are
            quantised, and transformers' stacked experts by modules; its names are those of the
            files, or what transformers makes of those. After an error it is as it was. Without it
            the folder is a transformers causal language model, which is built.
        format: what the tensors are, where the config does not say or is wrong; it is not doubted.
        device: where quantised layers go; by default where the replaced ones are.

    Returns:
        The model.

    Raises:
        ValueError: files are damaged or were changed after they were written, a tensor is missing,
            does not fit or is not finite, zeros are not what the config says or may be of two
            kinds, or the config is of no four-bit format; tensor and file are named. Or the path is
            a file's, or `into` has buffers on the meta device that files do not hold.
        FileNotFoundError: the folder or its safetensors are not there.
        TypeError: an argument is of another kind.

    Examples:
        >>> import tempfile
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> linear = nn.Linear(64, 32)
        >>> layer = QuantLinear.from_linear(linear, quantize_rtn(linear.weight, group_size=32))
        >>> folder = save_quantized(nn.Sequential(layer), tempfile.mkdtemp(), format="awq")
        >>> load_quantized(folder, into=nn.Sequential(nn.Linear(64, 32)))
        Sequential(
          (0): QuantLinear(in_features=64, out_features=32, bias=True, bits=4, group_size=32)
        )
    """
    if isinstance(model_or_path, nn.Module):
        require(into is None, "load_quantized", "into", "needs a path, not a model", type(into))
        carry_config(_convert(model_or_path, format, device))
        return model_or_path
    owner, rule = "load_quantized", "must be a module or a path"
    require_type(isinstance(model_or_path, str | Path), owner, "model_or_path", rule, model_or_path)
    module = into is None or isinstance(into, nn.Module)
    require_type(module, owner, "into", "must be a module", into)
    folder = SafetensorsFolder(model_or_path)
    if into is None:
        from batchery.compress.quant.transformers_plugin import from_pretrained

        return from_pretrained(folder.path, folder.config(), format=format, device=device)
    with _put_back_on_error(into):
        scheme = Scheme.parse(folder.config(), form=format)
        _fill(into, folder, scheme.confirmed(folder.metadata, folder.path.name), device)
    carry_config(into)
    return into


def _fill(
    into: nn.Module, folder: SafetensorsFolder, scheme: Scheme, device: torch.device | str | None
) -> None:
    """Load a folder into a model."""
    layers = stored_layers(folder, scheme)
    places = layers_in_model(into, layers)
    read = {}
    for stored, names in layers.items():
        linear = linear_named(into, places[stored], folder.where(names))
        tensors = {own: folder.tensor(full) for own, full in names.items()}
        if f"{stored}.bias" in folder.files:
            tensors["bias"] = folder.tensor(f"{stored}.bias")
        read[places[stored]] = read_layer(scheme, tensors, linear, folder.where(names), device)
    require_one_size(scheme, read, folder.path.name)
    for name, layer in read.items():
        replace_module(into, name, layer)
    taken = {full for names in layers.values() for full in names.values()}
    taken |= {f"{stored}.bias" for stored in layers}
    rest = {name: folder.tensor(name) for name in folder.files if name not in taken}
    require_finite(into, rest.items(), folder)
    _load_rest(into, rest, set(read), folder)


@contextmanager
def _put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Give all modules of a model the children, parameters and buffers that they had."""
    tables = [
        table
        for module in model.modules()
        for table in (module._modules, module._parameters, module._buffers)
    ]
    before = [dict(table) for table in tables]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for table, held in zip(tables, before, strict=True):
            table.clear()
            table.update(held)  # type: ignore[arg-type]
        raise


def carry_config(model: nn.Module) -> None:
    """Let the transformers models in a model write and load their four-bit layers themselves."""
    home = sys.modules.get("transformers.modeling_utils")
    if home is None:
        return
    if not isinstance(model, home.PreTrainedModel):
        for child in model.children():
            carry_config(child)
    elif any(quant_layers(model)):
        from batchery.compress.quant.transformers_plugin import attach_quantizer

        attach_quantizer(model)


def save_quantized(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format = "gptq_v2",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model with `QuantLinear` layers as a folder that other tools read.

    Every file is written whole or not at all, config.json last; without it nothing is read. Files
    hold digests of their tensors, by which `load_quantized` sees whether they were changed.
    Scales go to float16 in all formats but compressed-tensors. A transformers model's folder has
    its config and can be loaded by name; any other model's has the quantisation's alone. Experts
    are named one by one, as in the files that transformers makes stacks of.

    Args:
        model: has at least one `QuantLinear`.
        path: the folder; it is made.
        format: "gptq_v2", "gptq_v1" (for older readers), "compressed-tensors", "awq" or "marlin".
            Act-order goes best to GPTQ: newer versions of compressed-tensors have given it up.
        shard_bytes: size above which the weights are cut into several files.

    Returns:
        The folder.

    Raises:
        ValueError: the format cannot hold a layer, layers differ in what one config must say, a
            layer stands at two places, the path is a file's, or shard_bytes is below 1.
        TypeError: an argument is of another kind.

    Examples:
        >>> import tempfile
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> layer = QuantLinear.from_quantized(quantize_rtn(torch.ones(8, 32), group_size=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_quantized(nn.Sequential(layer), folder)
        ...     sorted(file.name for file in path.iterdir())
        ['config.json', 'model.safetensors']
    """
    owner, path = "save_quantized", Path(path)
    require_type(isinstance(model, nn.Module), owner, "model", "must be a module", model)
    require(not path.is_file(), owner, "path", "must be a folder", str(path))
    integer(owner, "shard_bytes", shard_bytes, at_least=1)
    safetensors = import_extra("safetensors.torch", "hf", "save_quantized")
    scheme, config = described(model, format)
    renamed = name_in_files(model)
    state = {renamed(name): tensor for name, tensor in quantized_state_dict(model, scheme).items()}
    shards = list(_shards(state, shard_bytes))
    files: dict[str, str] = {}
    # Weights under another config would be read wrongly: a folder left half-written has none.
    for name in (CONFIG, OLD_CONFIG):
        (path / name).unlink(missing_ok=True)
    for place, tensors in enumerate(shards, 1):
        file = f"model-{place:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WHOLE
        said = {"format": "pt", **scheme.metadata(), **digests_of(tensors)}
        data = safetensors.save(tensors, metadata=said)
        atomic_write(path / file, data)
        files |= dict.fromkeys(tensors, file)
    for old in path.glob("*.safetensors"):
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", old.name):
            if old.name not in files.values():
                old.unlink()
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        atomic_write(path / INDEX, _json(index))
    else:
        (path / INDEX).unlink(missing_ok=True)
    _write_configs(model, path, config)
    return path


def described(model: nn.Module, format: Format) -> tuple[Scheme, dict[str, Any]]:
    """Return how to store a model's layers, and its `quantization_config`; errors as on saving."""
    layers = dict(quant_layers(model))
    scheme = _scheme_of(layers, format)
    renamed = name_in_files(model)
    kept = [
        renamed(f"{name}.weight").removesuffix(".weight")
        for name, module in model.named_modules()
        if _is_linear(module)
    ]
    quantised = [name.rpartition(".")[2] for name in layers]
    return scheme, scheme.config(kept, lm_head="lm_head" in quantised)


def quantized_state_dict(model: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
    """Return a model's state with quantised layers in a checkpoint's format, tied tensors once.

    Examples:
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> layer = QuantLinear.from_quantized(quantize_rtn(torch.ones(8, 32), group_size=32))
        >>> sorted(quantized_state_dict(nn.Sequential(layer), Scheme("awq")))
        ['0.qweight', '0.qzeros', '0.scales']
    """
    layers = dict(quant_layers(model))
    fused = [name for name, layer in layers.items() if layer.gated]
    rule = "must not be fused: formats have gate and up apart; save before fuse_mlps"
    require(not fused, "save_quantized", "model", rule, fused[:3])
    modules = model.named_modules(remove_duplicate=False)
    twice = [name for name, m in modules if isinstance(m, QuantLinear) and name not in layers]
    rule = "must have each QuantLinear at one place (copy.deepcopy makes another)"
    require(not twice, "save_quantized", "model", rule, twice[:3])
    state: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in _state_without(model, layers).items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = tensor.detach().contiguous()
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        try:
            packed = scheme.write(layer.quantized_weight())
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}") from error
        if layer.bias is not None:
            packed["bias"] = layer.bias.detach()
        state |= {prefix + own: tensor.cpu() for own, tensor in packed.items()}
    return state


def _state_without(
    model: nn.Module, layers: Collection[str], *, keep_vars: bool = False
) -> dict[str, Tensor]:
    """Return the state of all modules but `layers`, without packing theirs."""
    prefixes = tuple(f"{name}." for name in layers)
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers or name.startswith(prefixes):
            continue
        prefix = f"{name}." if name else ""
        module._save_to_state_dict(state, prefix, keep_vars)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _scheme_of(layers: Mapping[str, QuantLinear], name: Format) -> Scheme:
    """Return the scheme to store layers by, or raise if one config cannot describe them."""
    owner = "save_quantized"
    one_of(owner, "format", name, FORMATS)
    require(bool(layers), owner, "model", "must have a QuantLinear", "none")
    whole = {layer.in_features for layer in layers.values() if _one_group(layer)}
    sizes = {layer.group_size for layer in layers.values() if not _one_group(layer)}
    # Where K is the group size of other layers, one group a row is nothing special.
    agree = len(sizes) <= 1 and (not sizes or whole <= sizes)
    found = {name: layer.group_size for name, layer in layers.items()}
    require(agree, owner, "group_size", "must be one for all layers", found)
    return Scheme(
        family="gptq" if name.startswith("gptq") else name,
        version=1 if name == "gptq_v1" else 2 if name == "gptq_v2" else None,
        group_sizes=(sizes.pop() if sizes else -1,),
        symmetric=all(layer.zeros is None for layer in layers.values()),
        act_order=any(layer.g_idx is not None for layer in layers.values()),
    )


def _is_linear(module: nn.Module) -> bool:
    """Say whether other tools take a module for a linear layer, as they do routers."""
    return linear_weight(module) is not None or type(module).__name__.endswith("Router")


def _one_group(layer: QuantLinear) -> bool:
    return layer.group_size == layer.in_features


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield the quantised layers and their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def linear_named(model: nn.Module, name: str, where: str) -> nn.Linear:
    """Return a linear layer, or raise a ValueError that says which file wants it."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = nn.Identity()
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"load_quantized: the model has no nn.Linear {where}")
    return linear


def replace_module(model: nn.Module, name: str, module: nn.Module | Tensor) -> None:
    """Put a module (or a parameter) in the place of another."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def stored_layers(folder: SafetensorsFolder, scheme: Scheme) -> dict[str, dict[str, str]]:
    """Return the layers in a folder's files, see `layers_of`; raise where one lost its words."""
    layers = layers_of(folder.files, scheme.family)
    words, first, second = NAMES[scheme.family][:3]
    for name, file in folder.files.items():
        layer, _, own = name.rpartition(".")
        lost = own == first and layer not in layers and f"{layer}.{second}" in folder.files
        rule, got = "must have all weights", f"no {layer}.{words} for {name} in {file}"
        require(not lost, "load_quantized", f"files in {folder.path.name}", rule, got)
    return layers


def require_finite(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], folder: SafetensorsFolder
) -> None:
    """Raise where a dense tensor holds NaN, or a parameter infinity, as the buffers of masks do."""
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for name, tensor in tensors:
        fine = all_finite(tensor, infinity=name.rpartition(".")[2] not in parameters)
        where = f"{name} in {folder.files[name]}"
        require(fine, "load_quantized", where, "must be finite", "NaN or infinity")


def read_layer(
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    linear: nn.Linear,
    where: str,
    device: torch.device | str | None = None,
) -> QuantLinear:
    """Make the layer that replaces `linear`."""
    qw = scheme.read(tensors, where)
    shape = (linear.out_features, linear.in_features)
    require(qw.shape == shape, "load_quantized", f"weight of {where}", f"must be {shape}", qw.shape)
    had = linear.weight.device
    device = device or (qw.q.device if had.type == "meta" else had)
    bias = tensors.get("bias")
    if linear.bias is None and bias is not None and not bias.any():
        bias = None  # some tools write zeros for layers without a bias
    sizes = None if bias is None else tuple(bias.shape)
    fits = sizes == shape[:1] or (bias is None and linear.bias is None)
    require(fits, "load_quantized", f"bias of {where}", f"must be {shape[:1]}", sizes)
    dtype = linear.weight.dtype
    layer = QuantLinear.from_quantized(qw, bias, device=device, dtype=dtype)
    layer.transposed = isinstance(linear, TransposedLinear)
    return layer.train(linear.training)


def require_one_size(scheme: Scheme, layers: Mapping[str, QuantLinear], where: str) -> None:
    """Raise where groups differ and no config says how: a cut table would read as larger groups."""
    sizes = {name: layer.group_size for name, layer in layers.items() if not _one_group(layer)}
    same = bool(scheme.group_sizes) or len(set(sizes.values())) < 2
    rule = "must be one for all layers, or in the config"
    require(same, "load_quantized", f"group_size in {where}", rule, sizes)


def _convert(
    model: nn.Module, form: Format | Literal["auto"], device: torch.device | str | None
) -> nn.Module:
    """Replace modules that hold another tool's tensors."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        config = config if isinstance(config, dict) else config.to_dict()
    known = config is not None or form != "auto"
    require(known, "load_quantized", "format", "must be given: the model has no config", form)
    scheme = Scheme.parse(config or {}, form=form)
    names = NAMES[scheme.family]
    found = 0
    for name, module in list(model.named_modules()):
        tensors = {own: getattr(module, own, None) for own in (*names, "bias")}
        held = all(isinstance(tensors[own], Tensor) for own in names[:2])
        if isinstance(module, QuantLinear) or not held:
            continue
        there = {own: t.detach() for own, t in tensors.items() if isinstance(t, Tensor)}
        qw = scheme.read(there, name)
        layer = QuantLinear.from_quantized(qw, there.get("bias"), device=device)
        replace_module(model, name, layer.train(module.training))
        found += 1
    rule = f"must have layers with {names[0]} and {names[1]}"
    require(found > 0, "load_quantized", "model", rule, "none")
    return model


def _load_rest(
    model: nn.Module, rest: dict[str, Tensor], layers: set[str], folder: SafetensorsFolder
) -> None:
    """Load what is not quantised; only tied tensors may be missing."""
    named = _state_without(model, layers, keep_vars=True)
    renamed = name_in_model(model)
    rest = {name if name in named else renamed(name): tensor for name, tensor in rest.items()}
    tied: dict[int, list[str]] = {}
    for name, tensor in named.items():
        tied.setdefault(id(tensor), []).append(name)
    owner, where = "load_quantized", f"files in {folder.path.name}"
    extra = [name for name in rest if name not in named]
    require(not extra, owner, where, "must have tensors of the model alone", extra[:3])
    for name, tensor in rest.items():
        shape, got = tuple(named[name].shape), tuple(tensor.shape)
        require(got == shape, owner, f"{name} in {where}", f"must be {shape}", got)
    for names in tied.values():
        there = any(name in rest for name in names)
        require(there, owner, where, "must have all tensors of the model", f"no {names[0]}")
    hollow = [name for name, own in model.named_buffers() if own.is_meta and name not in named]
    rule = "must have no buffers on the meta device that are not saved"
    require(not hollow, owner, "into", rule, hollow[:3])
    on_meta = any(tensor.is_meta for tensor in named.values())
    model.load_state_dict(rest, strict=False, assign=on_meta)
    for names in tied.values() if on_meta else ():
        given = next(name for name in names if name in rest)
        module, _, own = given.rpartition(".")
        tensor = getattr(model.get_submodule(module), own)
        for name in names:
            replace_module(model, name, tensor)


def _shards(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Cut a state into parts of at most `limit` bytes, or of one tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor.cpu()
        size += tensor.nbytes
    yield part


def _write_configs(model: nn.Module, path: Path, quantization: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    content: dict[str, Any] = {}
    if config is not None and hasattr(config, "to_dict"):
        content = config.to_dict()
        content["architectures"] = [type(model).__name__]
        dtype = getattr(model, "dtype", None)
        if dtype is not None:  # else a reader may take the scales' dtype for the model's
            content["dtype"] = str(dtype).removeprefix("torch.")
        if isinstance(getattr(model, "get_output_embeddings", lambda: None)(), QuantLinear):
            content["tie_word_embeddings"] = False
        generation = getattr(model, "generation_config", None)
        if generation is not None and hasattr(generation, "to_json_string"):
            atomic_write(path / "generation_config.json", generation.to_json_string().encode())
    content["quantization_config"] = quantization
    atomic_write(path / CONFIG, _json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
