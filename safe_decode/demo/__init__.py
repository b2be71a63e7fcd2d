"""The demo: an embedded model pair, bare and guarded side by side.

Knows the embedded artefacts, how to run both arms and how to show them. Does not know
how the artefacts were made, nor how a response is judged: the judge is passed in.
"""

from safe_decode.demo.embedded_pair import Embedded, embedded

__all__ = ["Embedded", "embedded"]
