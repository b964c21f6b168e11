"""PHP's own value classes, taken apart and built again: ``stdClass``, ``DateTime`` and ``DateTimeImmutable``.

Knows these classes and the standard library. Must not know how values are written. Imported when the first such value
is met.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone, tzinfo

from ..errors import SerializationError
from ..type_info import TypeInfo
from .text_serializer import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["CLASSES"]

_OFFSET, _ABBREVIATION, _NAME = 1, 2, 3  # what PHP calls timezone_type
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}\Z").match
_ZONE_OFFSET = re.compile(r"[+-][0-9]{2}:[0-9]{2}(?::[0-9]{2})?\Z").match
_ZONE_NAME = re.compile(r"[A-Za-z0-9_+-]{1,40}(?:/[A-Za-z0-9_+-]{1,40}){0,3}\Z").match

# Minutes from UTC, as PHP reads these abbreviations, its letters for the zones at sea among them.
_ABBREVIATIONS = {
    name: minutes
    for minutes, names in {
        -720: "Y", -660: "X SST", -600: "W HST AHST", -540: "V AKST YST AHDT", -480: "U PST AKDT YDT",
        -420: "T MST PDT", -360: "S CST MDT", -300: "R EST CDT", -240: "Q AST EDT", -210: "NST", -180: "P ADT",
        -120: "O", -60: "N", 0: "Z UTC UCT GMT WET", 60: "A BST CET MET WAT WEST",
        120: "B CAT CEST EET IST MEST SAST WAST", 180: "C EAT EEST IDT MSK", 240: "D MSD", 300: "E PKT", 360: "F PKST",
        420: "G WIB", 480: "H AWST HKT WITA", 510: "KST", 540: "I AWDT HKST JST WIT", 570: "ACST CAST",
        600: "K AEST CHST GST", 630: "ACDT", 660: "L AEDT", 720: "M NZST", 780: "NZDT",
    }.items()
    for name in names.split()
}  # fmt: skip


class _Date(TypeInfo):
    def values(self, obj: datetime) -> dict[str, Any]:
        text = obj.isoformat(" ", "microseconds")
        date, zone = text[:26], text[26:]
        if not zone:
            raise SerializationError(
                "a naive datetime cannot travel in PHP's format: give it a tzinfo, as datetime.now(timezone.utc) has one"
            )
        if "." in zone:
            text = "a datetime cannot travel in PHP's format with an offset that has fractions of a second"
            raise SerializationError(text)
        return {"date": date, "timezone_type": _OFFSET, "timezone": zone}

    def build(self, values: dict[str, Any]) -> datetime:
        date, kind, zone = values.get("date"), values.get("timezone_type"), values.get("timezone")
        if type(date) is not str or not _DATE(date):
            raise SerializationError(f"a date of PHP cannot be read: {shown(date)} is no date of the years 1 to 9999")
        try:
            if kind == _OFFSET and type(zone) is str and _ZONE_OFFSET(zone):
                return datetime.fromisoformat(date + zone)
            return datetime.fromisoformat(date).replace(tzinfo=_zone(kind, zone))
        except ValueError as exc:
            raise SerializationError(f"a date of PHP cannot be read: {exc}") from exc


def _zone(kind: Any, zone: Any) -> tzinfo:
    text = zone if type(zone) is str else ""
    if kind == _ABBREVIATION and text.upper() in _ABBREVIATIONS:
        return timezone(timedelta(minutes=_ABBREVIATIONS[text.upper()]))
    if kind == _NAME and text == "UTC":
        return timezone.utc
    if kind == _NAME and _ZONE_NAME(text):
        import zoneinfo

        try:
            return zoneinfo.ZoneInfo(text)
        except (OSError, ValueError, KeyError):  # KeyError: there is no such file; the others: it is no zone's
            pass
    raise SerializationError(
        f"the time zone {shown(zone)} of a date of PHP is not known here: install the package tzdata, or"
        " send the date with an offset"
    )


class _Properties(TypeInfo):
    def build(self, values: dict[str, Any]) -> dict[str, Any]:
        return values


# What stands for a class of PHP's where the registry has none.
CLASSES: dict[str, TypeInfo] = {
    "stdClass": _Properties(dict, "stdClass"),
    "DateTime": _Date(datetime, "DateTimeImmutable"),
    "DateTimeImmutable": _Date(datetime, "DateTimeImmutable"),
}
