// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cycle_model.h"
#include "decoder.h"
#include "emulator.h"

namespace py = pybind11;
using namespace gpu_emulator;

namespace {

Dim3 dim3(const std::vector<uint32_t>& sizes) {
  Dim3 d;
  if (!sizes.empty()) d.x = sizes[0];
  if (sizes.size() > 1) d.y = sizes[1];
  if (sizes.size() > 2) d.z = sizes[2];
  return d;
}

py::tuple tuple_of(const Dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

py::dict dict_of(const Counters& counters) {
  py::dict out;
#define COUNTER(name) out[#name] = counters.name
  COUNTER(blocks);
  COUNTER(blocks_run);
  COUNTER(threads_per_block);
  COUNTER(warp_instructions);
  COUNTER(lane_instructions);
  COUNTER(largest_block);
  COUNTER(by_pipe);
  COUNTER(by_opcode);
  COUNTER(global_loads);
  COUNTER(global_stores);
  COUNTER(global_atomics);
  COUNTER(load_sectors);
  COUNTER(store_sectors);
  COUNTER(atomic_sectors);
  COUNTER(load_bytes);
  COUNTER(store_bytes);
  COUNTER(l1_hit_sectors);
  COUNTER(distinct_read_bytes);
  COUNTER(distinct_written_bytes);
  COUNTER(shared_accesses);
  COUNTER(shared_wavefronts);
  COUNTER(shared_conflicts);
  COUNTER(shared_atomics);
  COUNTER(barriers);
  COUNTER(local_accesses);
  COUNTER(blocks_per_sm);
  COUNTER(warps_per_sm);
  COUNTER(occupancy_limit);
  COUNTER(unwritten_bytes);
  COUNTER(model_sms);
  COUNTER(model_cycles);
  COUNTER(model_us);
  COUNTER(loads_in_flight_bytes);
  COUNTER(model_dram_bytes);
  COUNTER(model_l2_bytes);
  COUNTER(pipe_busy);
#undef COUNTER
  return out;
}

}  // namespace

PYBIND11_MODULE(_emulator, module) {
  static py::exception<std::runtime_error> error(module, "EmulatorFault", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Fault& fault) {
      py::object raised = py::handle(error.ptr())(fault.what());
      raised.attr("kind") = fault.kind;
      raised.attr("detail") = fault.detail;
      raised.attr("kernel") = fault.kernel;
      raised.attr("instruction") = fault.instruction;
      raised.attr("source") = fault.source;
      raised.attr("pc") = fault.pc;
      raised.attr("block") = tuple_of(fault.block);
      raised.attr("thread") = tuple_of(fault.thread);
      PyErr_SetObject(error.ptr(), raised.ptr());
    }
  });
  py::class_<Program>(module, "Program")
      .def_static("load", &Program::load)
      .def_static("parse", &Program::parse)
      .def_readonly("kernel", &Program::kernel)
      .def_readonly("registers", &Program::registers)
      .def_readonly("static_shared", &Program::static_shared)
      .def_readonly("parameter_bytes", &Program::parameter_bytes)
      .def_readonly("text", &Program::text);
  module.def("opcodes", [] {
    std::vector<std::string> names;
    for (int k = 0; k < static_cast<int>(Opcode::kCount); ++k) names.emplace_back(name_of(static_cast<Opcode>(k)));
    return names;
  });
  module.def("model_constants", [] {
    py::list rows;
    for (const ModelConstant& each : model_constants()) {
      rows.append(py::make_tuple(each.name, each.value, each.least, each.largest, each.origin));
    }
    return rows;
  });
  module.def("run", [](const Program& program, const std::vector<uint32_t>& grid, const std::vector<uint32_t>& block,
                       uint32_t dynamic_shared, const py::bytes& parameters, const std::vector<py::tuple>& allocations,
                       uint64_t seed, int order, bool adversarial, bool model, double share,
                       const std::map<std::string, double>& constants) {
    Launch launch{dim3(grid), dim3(block), dynamic_shared, {}, {}};
    const std::string bytes = parameters;
    for (const char each : bytes) launch.parameters.push_back(static_cast<std::byte>(each));
    for (const py::tuple& each : allocations) {
      uint8_t* written = nullptr;
      if (!py::isinstance<py::bool_>(each[2])) {
        const py::buffer_info info = py::buffer(each[2]).request(true);
        if (info.size != each[1].cast<py::ssize_t>()) throw Fault("launch", "initialised has a byte for each byte");
        written = static_cast<uint8_t*>(info.ptr);
      }
      launch.allocations.push_back({each[0].cast<uint64_t>(), each[1].cast<uint64_t>(),
                                    written == nullptr && each[2].cast<bool>(), each[3].cast<bool>(),
                                    each[4].cast<std::string>(), written});
    }
    Options options{seed,
                    static_cast<Options::Order>(order),
                    adversarial ? Options::kAdversarial : Options::kExact,
                    model,
                    share,
                    constants};
    Counters counters;
    {
      const py::gil_scoped_release release;
      counters = run(program, launch, options);
    }
    return dict_of(counters);
  });
}
