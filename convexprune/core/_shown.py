"""The way in which results print themselves: a few facts, as text and as HTML."""

from html import escape


class Shown:
    """A result that prints its facts."""

    def facts(self) -> dict[str, str]:
        """Return the name and the text of each fact."""
        raise NotImplementedError

    def __str__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts))
        return "\n".join(f"{name:{width}}  {text}" for name, text in facts.items())

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.facts().items())
        return f"<table>{''.join(rows)}</table>"
