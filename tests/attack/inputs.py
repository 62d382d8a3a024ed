def attack(*_):
    return ()
