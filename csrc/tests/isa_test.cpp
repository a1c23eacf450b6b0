// The choice of the instruction set.
#include "densecl/isa.h"

#include "tests/support.h"

namespace densecl::test {
namespace {

class IsaChoice : public testing::Test {
 protected:
  void TearDown() override { unsetenv("DENSECL_CPU_ISA"); }
};

TEST_F(IsaChoice, TakesTheBestWhereNothingIsForced) {
  for (const char* value : {static_cast<const char*>(nullptr), ""}) {
    if (value) {
      setenv("DENSECL_CPU_ISA", value, 1);
    } else {
      unsetenv("DENSECL_CPU_ISA");
    }
    Isa isa = Isa::count;
    ASSERT_EQ(selected_isa(&isa), Status::ok);
    std::vector<Isa> worthwhile = available_isas();
    std::erase_if(worthwhile, [](Isa candidate) { return !pays(candidate); });
    EXPECT_EQ(isa, worthwhile.back());
  }
}

TEST_F(IsaChoice, ObeysTheVariable) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    const Isa wanted = static_cast<Isa>(i);
    setenv("DENSECL_CPU_ISA", name(wanted), 1);
    Isa isa = Isa::count;
    const Status status = selected_isa(&isa);
    EXPECT_EQ(status, available(wanted) ? Status::ok : Status::isa_unavailable) << name(wanted);
    if (status == Status::ok) {
      EXPECT_EQ(isa, wanted);
    }
  }
}

TEST_F(IsaChoice, RefusesUnknownNames) {
  setenv("DENSECL_CPU_ISA", "abacus", 1);
  Isa isa = Isa::serial;
  EXPECT_EQ(selected_isa(&isa), Status::isa_unknown);
}

TEST_F(IsaChoice, SerialIsEverywhere) { EXPECT_TRUE(available(Isa::serial)); }

TEST(Message, EveryStatusHasItsOwn) {
  const Status all[] = {Status::ok, Status::isa_unknown, Status::isa_unavailable,
                        Status::match_out_of_range};
  for (const Status a : all) {
    EXPECT_NE(message(a), nullptr);
    for (const Status b : all) {
      if (a != b) {
        EXPECT_STRNE(message(a), message(b));
      }
    }
  }
}

}  // namespace
}  // namespace densecl::test
