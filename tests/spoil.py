"""What befalls files and states: bits that flip, ends that are lost, entries that are others."""

import copy

import torch

# instead of an entry
ODD = (None, "no", -1, 0.5, 10**400, float("nan"), [], {}, True)
TENSORS = (torch.zeros(3), torch.ones(2, 2).bool())


def flipped(content, place, bit=0):
    """Return bytes with one bit of one of them changed."""
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def spoilt_bytes(draw, content):
    """Return bytes that are not quite these, and what was done to them."""
    kind = draw.choice(["flip", "cut", "junk", "twice"]) if content else "junk"
    match kind:
        case "flip":
            found = flipped(content, draw.randrange(len(content)), draw.randrange(8))
        case "cut":
            found = content[: draw.randrange(len(content))]
        case "junk":
            found = draw.choice([b"{}", b"[]", b"null", b"", b"\x00", b"PK\x03\x04", b"[" * 9999])
        case _:
            found = content + content
    return kind, found


def spoilt(draw, value, odd=ODD):
    """Return a nested value with one of its entries another or gone."""
    value = copy.deepcopy(value)
    *path, last = draw.choice([*_entries(value)])
    place = value
    for key in path:
        place = place[key]
    if isinstance(place, dict) and draw.random() < 0.4:
        del place[last]
    elif isinstance(place[last], torch.Tensor) and draw.random() < 0.5:
        place[last] = place[last].flatten()[:-1].clone()
    else:
        place[last] = draw.choice(odd)
    return value


def _entries(value, path=()):
    """Yield the path of each entry of a nested value."""
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, part in pairs:
        yield (*path, key)
        yield from _entries(part, (*path, key))
