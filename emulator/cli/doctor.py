def add_parser(verbs: object) -> None:
    pass
