"""What only `make test-full` runs is made only for it."""


def pytest_generate_tests(metafunc):
    if "case_of_the_product" in metafunc.fixturenames:
        asked = metafunc.config.option.markexpr != "not full"
        metafunc.parametrize("case_of_the_product", metafunc.module.product() if asked else [])
