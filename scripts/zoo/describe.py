"""The sites of a model in a few lines that a person can read and a test can compare."""

from inarch.core.site import Sites


def lines(sites: Sites) -> list[str]:
    """One line for each kind of site: where, how often, how arranged, where `h` and `x` are, what projections."""
    found = []
    for group in sites.groups():
        site = group[0]
        output = _place(site.output.path, site.output.key)
        stream = "none" if site.stream is None else _place(site.stream.path, site.stream.key)
        roles = " ".join(
            f"{role}={'+'.join(part.path for part in parts)}" for role, parts in sorted(site.projections.items())
        )
        layout = "" if site.same_layout else ", another layout than the stream"
        found.append(
            f"{site.stack} {site.role} x{len(group)} {site.layer_class} {site.arrangement}: h {output}, x {stream}"
            f"{layout}{f', {roles}' if roles else ''}"
        )
    return found


def _place(path: str, key: tuple[int | str, ...]) -> str:
    return f"{path or '(layer)'}{''.join(f'[{part}]' for part in key)}"


def differences(recorded: list[str], found: list[str]) -> list[str]:
    """What one description says and the other does not, in the order of the lines."""
    return [
        *(f"gone: {line}" for line in recorded if line not in found),
        *(f"new: {line}" for line in found if line not in recorded),
    ]
