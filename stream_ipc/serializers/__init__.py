"""How messages become payload bytes: the interface and the built-in serializers, a module each."""
