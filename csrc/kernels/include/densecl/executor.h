// How a kernel runs its tasks on several threads without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace densecl {

// Calls body(context, task) once for every task in [0, tasks), in any order, on any thread, and
// returns when all are done. Tasks write disjoint memory and never depend on the thread they run
// on, so results are the same bits for every number of threads.
class Executor {
 public:
  virtual void run(int64_t tasks, void (*body)(void* context, int64_t task), void* context) = 0;

 protected:
  ~Executor() = default;
};

template <class Body>
void for_each_task(Executor& executor, int64_t tasks, Body&& body) {
  executor.run(
      tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

class SerialExecutor final : public Executor {
 public:
  void run(int64_t tasks, void (*body)(void*, int64_t), void* context) override {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
  }
};

}  // namespace densecl
