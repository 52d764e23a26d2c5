"""An extension of griffe, which reads our docstrings for the site."""

import griffe


class House(griffe.Extension):
    """Takes `Example:` for code, and the comment behind a field for its description."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")

    def on_attribute_instance(self, *, attr, **_):
        if attr.docstring or attr.parent is None or not attr.parent.is_class:
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1]
        said = line.partition("  # ")[2]
        if said:
            attr.docstring = griffe.Docstring(said, parent=attr, lineno=attr.lineno)
