"""Any fusion transformer with a ModelSpec: cut, attended projections, detection."""
