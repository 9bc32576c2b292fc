"""How codes, zero points and scales of other formats lie in words and bytes: pairs of functions that pack and unpack, one file a format.

The functions are pure, know no file and no model, and take stacks: every leading axis is kept. Codes are unsigned, uint8 [..., out, in].
"""
