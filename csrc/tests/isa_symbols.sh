#!/bin/sh
# A function that two files define under one name is kept once by the linker, from whichever file comes first. Were that
# the AVX-512 file, older machines would meet its instructions: so those files may share no symbol with any other.
#   isa_symbols.sh NM LIBRARY
set -eu
shared=$("$1" -C --defined-only "$2" | awk '
  /\.o:$/ { file = $0 }
  file ~ /_avx[0-9a-z]*\.cpp\.o/ && $2 == "W" && !/avx/ { print file, $0 }')
if [ -n "$shared" ]; then
  echo "symbols that an instruction set's file shares with others:"
  echo "$shared"
  exit 1
fi
