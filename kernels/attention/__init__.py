"""Full attention without a mask behind one dispatcher: `attention`, `attention_reference` that defines it,
and the table of backends."""

from .backends import BACKENDS, Backend, Request
from .op import attention, request_of
from .reference import attention_reference

__all__ = ["BACKENDS", "Backend", "Request", "attention", "attention_reference", "request_of"]
