"""The directive ``{nvcoll-table} NAME``: the Markdown that the function called NAME in `TABLES` returns."""

from reference_tables import TABLES
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective


class Table(SphinxDirective):
    """Puts a generated text where the directive stands."""

    required_arguments = 1

    def run(self):
        [name] = self.arguments
        if name not in TABLES:
            raise ExtensionError(f"nvcoll-table: no table {name!r}; there are {', '.join(TABLES)}")
        return self.parse_text_to_nodes(TABLES[name](), allow_section_headings=True)


def setup(app):
    app.add_directive("nvcoll-table", Table)
    return {"parallel_read_safe": True}
