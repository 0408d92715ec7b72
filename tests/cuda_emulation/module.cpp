// The CUDA launchers, compiled for the emulated device, as a Python module with the names that fastlm._C gives them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/dropout_add_norm_backward.cu"
#include "cuda/dropout_add_norm_forward.cu"

PYBIND11_MODULE(FASTLM_EMULATED, m) {
  m.def("dropout_add_norm_forward_cuda", &fastlm::dropout_add_norm_forward_cuda);
  m.def("dropout_add_norm_backward_cuda", &fastlm::dropout_add_norm_backward_cuda);
  m.def("dropout_add_norm_parts_cuda", &fastlm::dropout_add_norm_parts_cuda);
  m.def("configure", [](int capability, bool reverse, bool fail_next) {
    emulation::settings.capability = capability;
    emulation::settings.reverse = reverse;
    emulation::settings.fail_next = fail_next;
    emulation::settings.launches = emulation::settings.clusters = 0;
  });
  m.def("launches", [] { return std::pair<int, int>(emulation::settings.launches, emulation::settings.clusters); });
  m.def("to_bfloat16", &fastlm::float_to_bfloat16);
  m.def("to_float16", &fastlm::float_to_float16);
  m.def("from_float16", &fastlm::float16_to_float);
}
