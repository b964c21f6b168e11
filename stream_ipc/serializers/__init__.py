"""How messages become payload bytes: the built-in serializers, and what they share."""
