"""The bodies of the Open Inference Protocol V2: what clients send becomes words of `request`, and answers become bytes.

Sources: the KServe Open Inference Protocol V2 (REST) and Triton's extensions "binary tensor data", "classification" and
"parameters"; where they leave room, the answer is what Triton answers. Pure functions, no socket, no event loop.
May import: msgspec, numpy, ensemble_contract, `ensemble_gateway.request`. May not: anything else of the gateway.
"""

from ensemble_gateway.v2.answer import EncodedAnswer, answer_prefix, binary_sizes, encode_answer, error_body
from ensemble_gateway.v2.body import compress, decompress, split_body
from ensemble_gateway.v2.header import parse_header

__all__ = [
    "EncodedAnswer",
    "answer_prefix",
    "binary_sizes",
    "compress",
    "decompress",
    "encode_answer",
    "error_body",
    "parse_header",
    "split_body",
]
