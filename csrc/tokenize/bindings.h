// bindings.h: Python bindings of tokenize.h. Texts are read in place from str; ids are returned as int32 arrays that own
// their memory.
#pragma once

#include <pybind11/numpy.h>

#include <memory>

#include "../address.h"
#include "tokenize.h"

namespace megashear {

using IdTable = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// Moves a buffer into an array [ids].
inline py::array_t<int32_t> array_of(IdBuffer& ids) {
  const auto count = static_cast<py::ssize_t>(ids.size());
  int32_t* data = ids.release();
  return py::array_t<int32_t>(count, data, py::capsule(data, [](void* memory) { std::free(memory); }));
}

// Checks rules whose ids index tables; ValueError if a size or an id does not fit.
inline void check_rules(const BpeRules& rules) {
  const Arguments check("BpeEncoder");
  const auto size = static_cast<int64_t>(rules.texts.size());
  const auto check_id = [&](const char* name, int32_t id) {
    if (id < 0 || id >= size) {
      check.fail(name, "has id " + std::to_string(id) + ", outside of " + std::to_string(size) + " texts");
    }
  };
  if (!rules.ranks.empty() && rules.ranks.size() != rules.texts.size()) {
    check.fail("ranks", "must be empty or one per text, got " + std::to_string(rules.ranks.size()));
  }
  if (!rules.bytes.empty() && rules.bytes.size() != 256) {
    check.fail("bytes", "must be empty or 256 ids, got " + std::to_string(rules.bytes.size()));
  }
  for (const Merge& merge : rules.merges) check_id("merges", merge.merged);
  for (const int32_t id : rules.wholes) {
    check_id("wholes", id);
    if (rules.texts[static_cast<size_t>(id)].empty()) check.fail("wholes", "has id " + std::to_string(id) + ", no text");
  }
}

// The arguments are the fields of BpeRules; merges [n, 4]: left, right, rank, merged.
inline std::unique_ptr<BpeEncoder> bpe_encoder(std::vector<std::string> texts, std::vector<int32_t> ranks,
                                               const IdTable& merges, std::vector<int32_t> wholes,
                                               std::vector<int32_t> bytes, int32_t unknown, bool prefix) {
  BpeRules rules = {std::move(texts), std::move(ranks), {}, std::move(wholes), std::move(bytes), unknown, prefix};
  if (merges.ndim() != 2 || merges.shape(1) != 4) Arguments("BpeEncoder").fail("merges", "must have the shape [n, 4]");
  const auto rows = merges.unchecked<2>();
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    rules.merges.push_back({rows(i, 0), rows(i, 1), rows(i, 2), rows(i, 3)});
  }
  check_rules(rules);
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
