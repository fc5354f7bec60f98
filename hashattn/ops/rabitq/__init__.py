"""RaBitQ's estimate: signs of a rotated key, multiplied with a query in whole numbers, and two scalars."""
