// Every function of the compiled core that Python sees: one line each, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastlm.h"

namespace py = pybind11;
using nogil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlm's compiled core: kernels over raw addresses. Use fastlm.ops instead.";
  m.attr("__version__") = FASTLM_VERSION;
  m.def("cpu_isa", &fastlm::cpu_isa);
  m.def("cpu_isa_reason", &fastlm::cpu_isa_reason);
  m.def("cuda_archs", &fastlm::cuda_archs);
  m.def("cuda_device_count", &fastlm::cuda_device_count, nogil());
  m.def("copy_nontemporal", &fastlm::copy_nontemporal, nogil());
  m.def("attention_forward_cpu", &fastlm::attention_forward_cpu, nogil());
  m.def("attention_backward_cpu", &fastlm::attention_backward_cpu, nogil());
  m.def("reduce_in_order_cpu", &fastlm::reduce_in_order_cpu, nogil());
  m.def("int8_matmul_cpu", &fastlm::int8_matmul_cpu, nogil());
  m.def("quantize_int8_cpu", &fastlm::quantize_int8_cpu, nogil());
  m.def("rotary_cpu", &fastlm::rotary_cpu, nogil());
  py::class_<fastlm::PruneScores>(m, "PruneScores")
      .def(py::init<fastlm::Sizes, fastlm::Tensor, fastlm::Tensor, fastlm::Tensor, bool>());
  m.def("prune_select_cpu", &fastlm::prune_select_cpu, nogil());
  m.def("prune_rows_cpu", &fastlm::prune_rows_cpu, nogil());
  m.def("prune_groups_cpu", &fastlm::prune_groups_cpu, nogil());
  m.def("prune_transposable_cpu", &fastlm::prune_transposable_cpu, nogil());
  m.def("prune_blocks_cpu", &fastlm::prune_blocks_cpu, nogil());
  m.def("prune_histogram_cpu", &fastlm::prune_histogram_cpu, nogil());
  m.def("prune_cut_cpu", &fastlm::prune_cut_cpu, nogil());
  py::class_<fastlm::AdamW>(m, "AdamW").def(py::init<double, double, double, double, double>());
  m.def("masked_adamw_cpu", &fastlm::masked_adamw_cpu, nogil());
  m.def("apply_mask_cpu", &fastlm::apply_mask_cpu, nogil());
  m.def("mask_count_cpu", &fastlm::mask_count_cpu, nogil());
  m.def("mask_bits_cpu", &fastlm::mask_bits_cpu, nogil());
  m.def("read_cpu", &fastlm::read_cpu, nogil());
  m.def("philox4x32", &fastlm::philox4x32);
  m.def("dropout_add_norm_forward_cpu", &fastlm::dropout_add_norm_forward_cpu, nogil());
  m.def("dropout_add_norm_int8_cpu", &fastlm::dropout_add_norm_int8_cpu, nogil());
  m.def("dropout_add_norm_backward_cpu", &fastlm::dropout_add_norm_backward_cpu, nogil());
#ifdef FASTLM_CUDA
  m.def("dropout_add_norm_forward_cuda", &fastlm::dropout_add_norm_forward_cuda, nogil());
  m.def("dropout_add_norm_backward_cuda", &fastlm::dropout_add_norm_backward_cuda, nogil());
  m.def("dropout_add_norm_parts_cuda", &fastlm::dropout_add_norm_parts_cuda);
#endif
}
