"""Register "linvideo" with diffusers as a library of pipeline components, without importing diffusers.

diffusers loads the components named in model_index.json only from the libraries in LOADABLE_CLASSES. With "linvideo"
among them, a converted transformer is saved as ["linvideo", "LinVideoWanTransformer3DModel"], and
`WanPipeline.from_pretrained(folder)` finds it, in a local folder as well as on the Hub.
"""

import sys

_MODULE = "diffusers.pipelines.pipeline_loading_utils"


def install() -> None:
    """Register now if diffusers' loader is already imported, else as soon as it is. A second call does nothing."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


def _register(module) -> None:
    methods = ["save_pretrained", "from_pretrained"]
    module.LOADABLE_CLASSES.setdefault("linvideo", {"ModelMixin": methods, "SchedulerMixin": methods})


class _PostImportFinder:
    """Finder of that one module: it asks the other finders and has the module's loader register after executing it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None

        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            exec_module(module)
            _register(module)

        spec.loader.exec_module = exec_and_register
        return spec
