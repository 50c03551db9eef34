"""Passwords in addresses, kept out of what people and logs see."""

import re
from urllib.parse import quote, unquote

MASK = "***"
IN_QUERY = re.compile(r"((?:^|[?&;])(?:ssl)?(?:password|passwd|pwd)=)([^&;\s]+)", re.IGNORECASE)
URI = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s"'<>]+)""")


def password(uri: str) -> str:
    """The password of "scheme://user:PASSWORD@host...", which may hold any character; "" where there is none.

    What stands between the first ":" of the user's part and the last "@".
    """
    if not (match := URI.match(uri)):
        return ""
    user, at, _ = uri[match.end("scheme") :].rpartition("@")
    return user.partition(":")[2] if at else ""


def _passwords(uri: str) -> set[str]:
    """Of an address in all that it may be read as: an "@" may be the user's or a parameter's."""
    before, _, query = uri.partition("?")
    return {password(uri), password(before), *(value for _, value in IN_QUERY.findall(query))} - {""}


def without_password(text: str, *uris: str) -> str:
    """`text` without the passwords of `uris`, wherever and however quoted they stand in it, and of those in itself."""
    for secret in (secret for uri in uris for secret in _passwords(uri)):
        for form in sorted({secret, unquote(secret), quote(secret, safe=""), quote(unquote(secret), safe="")}, key=len):
            text = text.replace(form, MASK) if len(form) > 3 else text
    return URI.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    secret = password(match[0])
    shown = match[0].replace(f":{secret}@", f":{MASK}@", 1) if secret else match[0]
    return IN_QUERY.sub(rf"\1{MASK}", shown)
