"""The bundle: manifest, writing it whole, the report."""
