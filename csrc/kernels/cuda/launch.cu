// What the driver calls its errors.
#include <ptx/launch.cuh>

namespace densecl::cuda {

LaunchError launch_error(Status status) {
  const auto error = static_cast<cudaError_t>(static_cast<int32_t>(status) -
                                              static_cast<int32_t>(Status::launch_failed));
  return {cudaGetErrorName(error), cudaGetErrorString(error)};
}

}  // namespace densecl::cuda
