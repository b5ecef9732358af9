// bindings.h: tokenize.h as a Python class. Texts come as str and are read where they lie; ids go out as int32 arrays
// that own the memory they were written to.
#pragma once

#include <pybind11/numpy.h>

#include <memory>

#include "../address.h"
#include "tokenize.h"

namespace megashear {

using IdTable = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// An array [ids] that takes over a buffer's memory.
inline py::array_t<int32_t> array_of(IdBuffer& ids) {
  const auto count = static_cast<py::ssize_t>(ids.size());
  int32_t* data = ids.release();
  return py::array_t<int32_t>(count, data, py::capsule(data, [](void* memory) { std::free(memory); }));
}

// See BpeRules; merges [n, 4]: left, right, rank, merged.
inline std::unique_ptr<BpeEncoder> bpe_encoder(std::vector<std::string> texts, std::vector<int32_t> ranks,
                                               const IdTable& merges, std::vector<int32_t> wholes,
                                               std::vector<int32_t> bytes, int32_t unknown, bool prefix) {
  BpeRules rules = {std::move(texts), std::move(ranks), {}, std::move(wholes), std::move(bytes), unknown, prefix};
  const auto rows = merges.unchecked<2>();
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    rules.merges.push_back({rows(i, 0), rows(i, 1), rows(i, 2), rows(i, 3)});
  }
  return std::make_unique<BpeEncoder>(rules);
}

inline void bind_tokenize(py::module_& module) {
  py::class_<BpeEncoder>(module, "BpeEncoder")
      .def(py::init(&bpe_encoder))
      .def("encode", [](BpeEncoder& encoder, const py::str& text) {
        py::ssize_t size = 0;
        const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
        if (bytes == nullptr) throw py::error_already_set();  // a lone surrogate: UnicodeEncodeError
        IdBuffer ids;
        {
          const py::gil_scoped_release released;
          encoder.encode({bytes, static_cast<size_t>(size)}, ids);
        }
        return size == 0 ? py::array_t<int32_t>(0) : array_of(ids);
      });
}

}  // namespace megashear
