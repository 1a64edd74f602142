"""The addresses as OpenAPI describes them, made of what is asked and told there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from launch.serving.asked import Asked

REF = "#/components/schemas/{model}"
REFUSED = "a request that is refused, and why"


@dataclass(frozen=True)
class Address:
    method: str
    path: str
    act: Callable[..., Any]
    asked: type[Asked] | None
    told: type[BaseModel] | None


def described(addresses: Sequence[Address]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models: list[tuple[Any, Literal["validation", "serialization"]]] = []
    for one in addresses:
        models += [(one.asked, "validation")] if one.asked else []
        models += [(one.told, "serialization")] if one.told else []
    schemas, definitions = models_json_schema(models, ref_template=REF)
    asked = [one.asked.__name__ for one in addresses if one.asked]
    forms = {_form(name): _with_files(definitions["$defs"][name]) for name in asked}
    paths: dict[str, dict[str, Any]] = {}
    for one in addresses:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "M6", "version": _version()},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"] | forms | {"Refusal": _REFUSAL},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


_REFUSAL = {
    "type": "object",
    "properties": {
        "error": {"type": "object", "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}
    },
}


def _operation(one: Address, schemas: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": inspect.getdoc(one.act) or "",
        "operationId": one.act.__name__,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", one.path)
        ],
        "responses": {"200": _response(one, schemas), "4XX": _refused(), "5XX": _refused()},
    }
    if one.asked:
        as_json = {"schema": schemas[(one.asked, "validation")]}
        as_form = {"schema": {"$ref": REF.format(model=_form(one.asked.__name__))}}
        content = {"application/json": as_json, "multipart/form-data": as_form}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _form(name: str) -> str:
    return f"{name}AsForm"


def _with_files(schema: Any) -> Any:
    """A schema whose pictures are files as they are."""
    if isinstance(schema, dict):
        return {key: _with_files(value) for key, value in schema.items() if key != "contentEncoding"}
    return [_with_files(one) for one in schema] if isinstance(schema, list) else schema


def _response(one: Address, schemas: dict[Any, Any]) -> dict[str, Any]:
    if one.told is None:
        return {"description": "done"}
    return {
        "description": one.told.__name__,
        "content": {"application/json": {"schema": schemas[(one.told, "serialization")]}},
    }


def _refused() -> dict[str, Any]:
    return {"description": REFUSED, "content": {"application/json": {"schema": {"$ref": REF.format(model="Refusal")}}}}


def _version() -> str:
    try:
        return version("m6")
    except PackageNotFoundError:
        return "0"
