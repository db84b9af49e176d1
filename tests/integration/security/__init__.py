"""What `docs/security.md` lists, case by case; other cases are where the parts are tested."""
