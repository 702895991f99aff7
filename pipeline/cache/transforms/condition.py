"""SQL conditions over the columns of a cache, evaluated in memory by DuckDB for each row.

A condition is untrusted input: it must parse as a single expression, sees only the columns of one
row, and cannot read or write anything else.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import CacheError, MisuseError

_ROW = "__row"


class Condition:
    """A parsed SQL condition, bound to the columns of a cache."""

    def __init__(self, where: str, schema: pa.Schema) -> None:
        """Parse the condition, and test it on an empty table.

        Raises:
            MisuseError: it is not a condition over these columns; includes DuckDB's message.
            CacheError: DuckDB is not installed.
        """
        try:
            import duckdb
        except ImportError:
            raise CacheError("--where needs DuckDB: pip install 'soft-label-pipeline[sql]'") from None
        self._error = duckdb.Error
        self._where = where
        self._connection = duckdb.connect(":memory:", config={"enable_external_access": "false", "threads": "1"})
        for setting in ("python_enable_replacements = false", "lock_configuration = true"):
            self._connection.execute(f"set {setting}")
        self._query = f"select {_ROW} from cache where ({where}\n)"
        self._check_alone()
        self.keep(schema.empty_table())

    def keep(self, table: pa.Table) -> np.ndarray:
        """Return (rows,) bool: where the condition is true; NULL counts as false.

        Raises:
            MisuseError: the condition fails on a value.
        """
        columns = {field.name: _readable(table.column(field.name)) for field in table.schema}
        columns[_ROW] = pa.array(np.arange(table.num_rows))
        self._connection.register("cache", pa.table(columns))
        try:
            rows = self._connection.execute(self._query).fetchnumpy()[_ROW]
        except self._error as error:
            raise self._misuse(str(error)) from None
        mask = np.zeros(table.num_rows, dtype=bool)
        mask[np.asarray(rows, dtype=np.int64)] = True
        return mask

    def _check_alone(self) -> None:
        """Check that the query is one plain SELECT without a second statement or a subquery.

        A subquery would see a single row group only.
        """
        try:
            statements = self._connection.extract_statements(self._query)
            found: Any = self._connection.execute("select json_serialize_sql(?)", [self._query]).fetchall()
        except self._error as error:
            raise self._misuse(str(error)) from None
        parsed = json.loads(found[0][0])
        if parsed.get("error"):
            raise self._misuse(str(parsed.get("error_message")))
        node = parsed["statements"][0]["node"]
        plain = node["type"] == "SELECT_NODE" and not node["modifiers"] and not node["group_expressions"]
        plain = plain and node["having"] is None and node["qualify"] is None and node["sample"] is None
        if len(statements) != 1 or len(parsed["statements"]) != 1 or not plain or '"SUBQUERY"' in json.dumps(node):
            raise self._misuse("expected one condition on the columns of a row, without subqueries or other statements")

    def _misuse(self, why: str) -> MisuseError:
        first = why.strip().splitlines()[0] if why.strip() else "not a condition"
        return MisuseError(f"--where {self._where!r}: {first}")


def _readable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast lists of float16 to float32, since DuckDB does not read float16 from Arrow."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_float16(kind.value_type):
        return column.cast(pa.list_(pa.float32()))
    return column
