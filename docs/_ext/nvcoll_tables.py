"""The directive ``nvcoll-table``: text made from the package's own tables, so that the reference cannot differ."""

from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from nvcoll import settings


def table(header, rows):
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_table(internal):
    """Rows of `settings.TABLE`, those for users or those that `nvcoll run` sets."""
    rows = [
        (f"`{v.name}`", settings.KINDS[v.kind][0], f"`{settings.default_text(v, {})}`" if v.default else "unset", v.doc)
        for v in settings.TABLE
        if v.internal == internal
    ]
    return table(("variable", "value", "default", "meaning"), rows)


TABLES = {
    "settings": lambda: settings_table(internal=False),
    "internal-settings": lambda: settings_table(internal=True),
}


class Table(SphinxDirective):
    """``{nvcoll-table} NAME``: the Markdown that the function called NAME in `TABLES` returns."""

    required_arguments = 1

    def run(self):
        [name] = self.arguments
        if name not in TABLES:
            raise ExtensionError(f"nvcoll-table: no table {name!r}; there are {', '.join(TABLES)}")
        return self.parse_text_to_nodes(TABLES[name]())


def setup(app):
    app.add_directive("nvcoll-table", Table)
    return {"parallel_read_safe": True}
