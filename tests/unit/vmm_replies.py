"""Replies that no guest agent or QEMU would give: any JSON, with the keys of true ones."""

from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KEYS = st.sampled_from(["return", "error", "desc", "pid", "exited", "exitcode", "signal"])
REPLY = st.recursive(JSON, lambda inner: st.dictionaries(KEYS, inner), max_leaves=10)
