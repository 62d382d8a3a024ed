"""Fix Triton's interpreter where it differs from the compiler, for Triton 3.6.0 and 3.7.1.

The interpreter keeps bfloat16 as raw uint16 bits and computes with those bits: tl.dot multiplies bit patterns, `-x`
negates them, and fp32 -> bf16 truncates the mantissa instead of rounding to nearest even. In 3.6.0,
`for i in tl.range(tensor)` fails with numpy >= 2.4, where a one-element array is no longer a scalar.

The patch also makes the interpreter about twice as fast, without changing what it computes. It patches
`triton.language` once per launch instead of at every call of a device function, and it checks sums of integers for
overflow only inside `overflow_raises` (the interpreter itself computes the check and discards it).
"""

import contextlib

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16, with ties to even; NaN stays (quiet) NaN."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(data: np.ndarray) -> TensorHandle:
    return TensorHandle(data, tl.int1) if data.dtype == np.bool_ else TensorHandle(fp32_to_bf16(data), tl.bfloat16)


def apply() -> None:
    """Patch Triton's interpreter in place, once per process."""
    if getattr(InterpreterBuilder, "_bf16_patched", False):
        return
    cast, fp_to_fp, dot = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.create_dot,
    )
    binary, ternary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.ternary_op, InterpreterBuilder.unary_op
    patch_tensor, check_tensor = interpreter._patch_lang_tensor, ReduceScanOpInterface.check_tensor
    patch_lang, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # ids of the globals of modules that have been patched in this launch

    def cast_impl(self, src, dst_type):
        src = _widen(src)
        return _narrow(src.data.astype(np.float32)) if dst_type.scalar == tl.bfloat16 else cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        nearest = rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if dst_type.scalar == tl.bfloat16 and nearest:
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *args):
        return dot(self, _widen(a), _widen(b), d, *args)

    def binary_op(self, lhs, rhs, op):
        return _narrow(op(_widen(lhs).data, _widen(rhs).data)) if _is_bf16(lhs) else binary(self, lhs, rhs, op)

    def ternary_op(self, lhs, rhs, other, op):
        if _is_bf16(other) and op is not np.where:  # a select only moves bits, which is correct
            return _narrow(op(_widen(lhs).data, _widen(rhs).data, _widen(other).data))
        return ternary(self, lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        return ternary_op(self, x, y, z, lambda a, b, c: a * b + c)

    def unary_op(self, arg, op):
        return _narrow(op(_widen(arg).data)) if _is_bf16(arg) else unary(self, arg, op)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_lang_once(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    def execute_launch(self, *args, **kwargs):
        patched.clear()
        return execute(self, *args, **kwargs)

    def check_tensor_dtype(self, input):
        if any(arg.dtype == tl.bfloat16 for arg in input):
            raise NotImplementedError("reductions of bfloat16 are wrong in the interpreter: cast to float32 first")
        check_tensor(self, input)

    for method in (cast_impl, create_fp_to_fp, create_dot, binary_op, ternary_op, create_fma, unary_op):
        setattr(InterpreterBuilder, method.__name__, method)
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = execute_launch
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    ReduceScanOpInterface.check_tensor = check_tensor_dtype
    InterpreterBuilder._bf16_patched = True


@contextlib.contextmanager
def overflow_raises():
    """Context in which an int32 sum or product that overflows raises; on a GPU it would wrap around."""
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = before
