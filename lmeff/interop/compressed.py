"""The compressed-tensors layout of quantized matrices, which vLLM and transformers read: names, shapes and dtypes of the tensors, and the config beside them.

Everything here is about one matrix in PyTorch's orientation, a `QTensor` [out, in] with a scale for each output, for each group of inputs of an output, or one
for all. Its law is the layout's own, `value = (q - zero) * scale`, so nothing is rounded on the way out or in.

| layout | for | tensors beside `MODULE.` |
|---|---|---|
| pack-quantized | integers, weights alone | weight_packed int32 (inputs packed), weight_scale, weight_shape; affine: weight_zero_point int32 (outputs packed) |
| int-quantized | integers with quantized inputs | weight int8, weight_scale; affine: weight_zero_point int8; static inputs: input_scale, input_zero_point |
| float-quantized | fp8 | weight float8_e4m3fn, weight_scale; static inputs: input_scale |

Which layout goes with what is vLLM's choice: it runs weights alone from pack-quantized and with inputs from the others, packed ones of 4 and 8 bits. Format:
https://github.com/vllm-project/compressed-tensors, read by vllm/model_executor/layers/quantization/compressed_tensors in https://github.com/vllm-project/vllm.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QFormat, QTensor, scale_from_range
from lmeff.interop.bits import pack, unpack, words

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
MIXED = "mixed-precision"
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


class Scheme(NamedTuple):
    """How a matrix lies on disk: its layout, its format, and the format that its inputs are brought to (None: they stay as they are)."""

    layout: str
    weights: QFormat
    inputs: QFormat | None = None


def scheme_for(weights: QFormat, inputs: QFormat | None = None) -> Scheme:
    """The layout of a format. Where integers are packed one scale for all becomes the same scale for each output: nobody runs the other."""
    layout = FLOATS if weights.is_float else PACKED if inputs is None else INTEGERS
    if layout == PACKED and weights.granularity == "tensor":
        weights = dataclasses.replace(weights, granularity="channel")
    return Scheme(layout, weights, inputs)


def fitted(t: QTensor, where: str) -> QTensor:
    """The same matrix with groups as the layout has them; raises `ConfigError` where a group is ragged.

    A single group is a scale for each output. The layout wants whole groups, and the inputs are as many as the model has: none can be added.
    """
    if t.format.granularity != "group":
        return t
    size, group = t.shape[1], t.format.group
    assert group is not None
    if size <= group:
        return dataclasses.replace(t, format=dataclasses.replace(t.format, granularity="channel", group=None))
    if size % group:
        raise ConfigError(
            f"{where}: got the format {t.format} over {size} inputs, whose last group has only {size % group}; compressed-tensors knows whole groups "
            f"alone. Quantize it with groups that divide {size} (such as {np.gcd(size, group)}) or with a scale for each output."
        )
    return t


def compressed_specs(module: str, shape: tuple[int, int], scheme: Scheme, scales: Any = np.float32) -> dict[str, Any]:
    """Shapes and dtypes of what `compressed_tensors` gives for a matrix [out, in], known before it is there."""
    outputs, inputs = shape
    format, spec = scheme.weights, jax.ShapeDtypeStruct
    columns = inputs // format.group if format.group else 1
    per = (1,) if format.granularity == "tensor" else (outputs, columns)
    found: dict[str, Any] = {"weight_scale": spec(per, scales)}
    if scheme.layout == PACKED:
        found["weight_packed"] = spec((outputs, words(inputs, format.bits)), np.int32)
        found["weight_shape"] = spec((2,), np.int64)
    else:
        found["weight"] = spec(shape, FLOAT8 if format.is_float else np.int8)
    if not format.symmetric:
        packed = (words(outputs, format.bits), columns)
        found["weight_zero_point"] = spec(packed, np.int32) if scheme.layout == PACKED else spec(per, np.int8)
    if _is_static(scheme.inputs):
        found["input_scale"] = spec((1,), scales)
        if scheme.inputs is not None and not scheme.inputs.symmetric:
            found["input_zero_point"] = spec((1,), np.int8)
    return _named(module, found)


def compressed_tensors(
    module: str, t: QTensor, scheme: Scheme, *, scales: Any = np.float32, inputs: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """`{name: array}` of one matrix [out, in], a `fitted` one. `inputs`: the calibrated range (low, high) of a static format of inputs.

    scales: the dtype of scales on disk. float32 keeps every value; a narrower one rounds them.
    """
    format, outputs = scheme.weights, t.shape[0]
    per = (1,) if format.granularity == "tensor" else (outputs, -1)
    scale, zero = (None if x is None else _per_output(np.asarray(x), t, format) for x in (t.scale, t.zero))
    assert scale is not None
    found = {"weight_scale": scale.reshape(per).astype(scales)}
    codes = np.asarray(t.q)
    if scheme.layout == PACKED:
        found["weight_packed"] = pack(codes.astype(np.int8), format.bits)
        found["weight_shape"] = np.asarray(t.shape, np.int64)
    else:
        found["weight"] = codes if format.is_float else codes.astype(np.int8)
    if zero is not None:
        packed = pack(zero.T, format.bits).T if scheme.layout == PACKED else zero.reshape(per).astype(np.int8)
        found["weight_zero_point"] = packed
    if scheme.inputs is not None and _is_static(scheme.inputs):
        assert inputs is not None, f"{module}: static inputs need their range"
        found |= _input_tensors(scheme.inputs, inputs, scales)
    return {name: np.ascontiguousarray(x) for name, x in _named(module, found).items()}


def _per_output(scale: np.ndarray, t: QTensor, format: QFormat) -> np.ndarray:
    """A scale or zero [out, columns]; one for all is repeated where the layout has one for each output."""
    wide = t.format.granularity == "tensor" and format.granularity == "channel"
    return np.repeat(scale, t.shape[0], axis=0) if wide else scale


def _input_tensors(format: QFormat, range_2: np.ndarray, scales: Any) -> dict[str, np.ndarray]:
    scale, zero = scale_from_range(jnp.float32(range_2[0]), jnp.float32(range_2[1]), format)
    found = {"input_scale": np.asarray(scale).reshape(1).astype(scales)}
    return found if zero is None else found | {"input_zero_point": np.asarray(zero).reshape(1).astype(np.int8)}


def _named(module: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{module}.{suffix}": value for suffix, value in sorted(found.items())}


def _is_static(format: QFormat | None) -> bool:
    return format is not None and format.granularity == "tensor"


def quantization_config(schemes: Mapping[str, Scheme], dense: Collection[str] = ()) -> dict[str, Any]:
    """What config.json says under "quantization_config". schemes: of every quantized linear module, by its name; dense: the names of all others.

    Layers that a runtime fuses (query, key and value; gate and up) need the same scheme. One scheme for all is said of the class Linear; several say, each,
    which modules they are of, as patterns in which a number stands for any number.
    """
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    layouts = {scheme.layout for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else _patterns(modules),
                "weights": _weight_args(scheme.weights),
                "input_activations": None if scheme.inputs is None else _input_args(scheme.inputs),
                "output_activations": None,
                "format": scheme.layout,
            }
            for i, (scheme, modules) in enumerate(groups.items())
        },
        "ignore": _patterns(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _patterns(modules: Iterable[str]) -> list[str]:
    """Names as they are, or patterns of those that count."""

    def pattern(module: str) -> str:
        numbered = re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(module))
        return module if numbered == re.escape(module) else f"re:{numbered}$"

    return list(dict.fromkeys(map(pattern, modules)))


def _weight_args(format: QFormat) -> dict[str, Any]:
    return {**_args(format), "strategy": format.granularity, "group_size": format.group, "dynamic": False}


def _input_args(format: QFormat) -> dict[str, Any]:
    static = _is_static(format)
    return {**_args(format), "strategy": "tensor" if static else "token", "group_size": None, "dynamic": not static}


def _args(format: QFormat) -> dict[str, Any]:
    return {"num_bits": format.bits, "type": format.kind, "symmetric": format.symmetric}


def read_schemes(config: Mapping[str, Any], modules: Iterable[str], where: str) -> dict[str, Scheme]:
    """The scheme of every quantized module among the linear ones named; raises `CheckpointError` for what cannot be read without rounding or loss."""
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if config.get(key) and config[key] != {
            **config[key],
            "format": "dense",
        }:  # older tools say so where nothing is sparse
            raise _refused(f"{where}.{key}", config[key], "none: it changes more than the matrices")
    groups = [
        (group["targets"], _read_scheme(group, config.get("format"), f"{where}.config_groups.{name}"))
        for name, group in config["config_groups"].items()
    ]
    found: dict[str, Scheme] = {}
    for module in modules:
        if not any(_matches(module, target) for target in config.get("ignore") or ()):
            fits = (scheme for targets, scheme in groups if any(_matches(module, target) for target in targets))
            scheme = next(fits, None)
            if scheme is not None:
                found[module] = scheme
    return found


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Linear")


def _read_scheme(group: Mapping[str, Any], layout: Any, where: str) -> Scheme:
    layout = group.get("format") or layout
    if layout not in (PACKED, INTEGERS, FLOATS, "naive-quantized"):
        raise _refused(f"{where}.format", layout, f"one of {PACKED}, {INTEGERS}, {FLOATS}")
    if group.get("output_activations"):
        raise _refused(f"{where}.output_activations", group["output_activations"], "none: outputs stay as they are")
    weights = _read_format(
        group["weights"], f"{where}.weights", {"tensor": "tensor", "channel": "channel", "group": "group"}
    )
    if group["weights"].get("dynamic"):
        raise _refused(f"{where}.weights.dynamic", True, "false: weights have their scales with them")
    given = group.get("input_activations")
    inputs = None
    if given:
        inputs = _read_format(given, f"{where}.input_activations", {"token": "channel", "tensor": "tensor"})
        if bool(given.get("dynamic")) != (inputs.granularity == "channel"):
            raise _refused(
                f"{where}.input_activations.dynamic", given.get("dynamic"), "true for token, false for tensor"
            )
    layout = layout if layout != "naive-quantized" else FLOATS if weights.is_float else INTEGERS
    return Scheme(layout, weights, inputs)


def _read_format(args: Mapping[str, Any], where: str, strategies: Mapping[str, str]) -> QFormat:
    kind, bits, strategy = args.get("type", "int"), args.get("num_bits", 8), args.get("strategy")
    group = args.get("group_size")
    strategy = strategy or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy not in strategies:
        raise _refused(f"{where}.strategy", strategy, f"one of {', '.join(strategies)}")
    if kind == "float" and bits != 8:
        raise _refused(f"{where}.num_bits", bits, "8 with the type float")
    return QFormat(
        kind=kind,
        bits=bits,
        symmetric=args.get("symmetric", True),
        granularity=strategies[strategy],
        group=group if strategy == "group" else None,
    )


def _refused(where: str, got: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: got {str(got)[:80]}, expected {expected}; nothing is loaded. Load the model's own weights and quantize them on opening."
    )


def read_matrix(module: str, shape: tuple[int, int], scheme: Scheme, read: Callable[[str], np.ndarray]) -> QTensor:
    """The `QTensor` [out, in] of a module, bit for bit: `read(name)` gives its tensors. Its dtype is that of the scales, in which the layout's values are.

    Raises `CheckpointError` where a tensor is not of the shape and dtype that the scheme asks for.
    """
    format, packed = scheme.weights, scheme.layout == PACKED
    specs = compressed_specs(module, shape, scheme)
    scale = read(f"{module}.weight_scale")
    found = {name: read(name) for name in specs if not name.endswith(("weight_scale", "_shape", ".input_scale"))}
    for name, x in found.items():
        if (x.shape, x.dtype) != (specs[name].shape, specs[name].dtype):
            spec = specs[name]
            raise CheckpointError(
                f"{name}: got {x.dtype}{[*x.shape]}, expected {spec.dtype}{[*spec.shape]} for {scheme.layout} {format}"
            )
    columns = shape[1] // format.group if format.group else 1
    per = (1, 1) if format.granularity == "tensor" else (shape[0], columns)
    if scale.size != per[0] * per[1]:
        raise CheckpointError(f"{module}.weight_scale: got {[*scale.shape]}, expected {[*per]} for {format}")
    codes = unpack(found[f"{module}.weight_packed"], format.bits, shape[1]) if packed else found[f"{module}.weight"]
    zero = found.get(f"{module}.weight_zero_point")
    if zero is not None:
        zero = (unpack(zero.T, format.bits, shape[0]).T if packed else zero.reshape(per)).astype(np.int32)
    axes = (-2, -1) if format.granularity == "tensor" else (-1,)
    codes = codes.astype(format.storage)
    return QTensor(codes, scale.reshape(per).astype(np.float32), zero, format, axes, scale.dtype.name)
