"""Imported where kernels are interpreted: lets their loops run.

Triton 3.6's interpreter has one-element arrays as loop bounds, which NumPy no
longer accepts as integers since 2.4.
"""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patched(tensor, *scope):
    _patch(tensor, *scope)
    # earlier versions of Triton have no scope
    put = scope[0].set_attr if scope else setattr
    put(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patched
