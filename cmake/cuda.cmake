# The CUDA library. MEDGPT_CUDA_ARCHS: "native" cards by default, "all" for wheels, or a list "80;90".
execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
set(release_archs 80 86 89 90 100 120)
set(archs "${MEDGPT_CUDA_ARCHS}")
if(archs STREQUAL "all")
  set(archs ${release_archs})
elseif(archs STREQUAL "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE caps ERROR_QUIET RESULT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(found EQUAL 0)
    string(REPLACE "." "" caps "${caps}")
    string(REGEX MATCHALL "[0-9]+" archs "${caps}")
    list(REMOVE_DUPLICATES archs)
  else()
    set(archs "")  # no card in sight: PTX alone, which a driver compiles once, keeps the build short
  endif()
endif()

set(flags "")
set(built "")
foreach(arch IN LISTS archs)
  if(known MATCHES "compute_${arch}(\n|$)")
    list(APPEND flags -gencode=arch=compute_${arch},code=sm_${arch})
    list(APPEND built ${arch})
  endif()
endforeach()
list(SORT built COMPARE NATURAL)
set(newest 80)
if(built)
  list(GET built -1 newest)
endif()
list(APPEND flags -gencode=arch=compute_${newest},code=compute_${newest})

file(GLOB CUDA_HEADERS CONFIGURE_DEPENDS csrc/*.h csrc/cuda/*.h)
set(objects "")
foreach(source IN LISTS CUDA_SOURCES)
  get_filename_component(stem ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/cuda_${stem}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${NVCC} -O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden -cudart=static
            --compiler-bindir=${CMAKE_CXX_COMPILER} -Xptxas=-v ${flags} -c ${source} -o ${object}
    DEPENDS ${source} ${CUDA_HEADERS}
    VERBATIM)
  list(APPEND objects ${object})
endforeach()

# nvcc may be a wrapper script: ask it where its toolkit is.
execute_process(COMMAND ${NVCC} --dryrun -c ${CMAKE_SOURCE_DIR}/csrc/cuda/probe.cu -o probe.o
                ERROR_VARIABLE dryrun OUTPUT_QUIET)
string(REGEX MATCH "TOP=([^\n]+)" _ "${dryrun}")
set(cuda_root "${CMAKE_MATCH_1}")
find_library(CUDART_STATIC cudart_static
             HINTS ${cuda_root} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
if(CUDART_STATIC)
  add_library(_cuda MODULE EXCLUDE_FROM_ALL ${objects})  # its failure must not cost the CPU code
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  find_package(Threads REQUIRED)
  target_link_libraries(_cuda PRIVATE ${CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
  set_target_properties(_cuda PROPERTIES LINKER_LANGUAGE CXX LIBRARY_OUTPUT_DIRECTORY ${MEDGPT_OUT}
                                         PREFIX "" SUFFIX .so)
  list(TRANSFORM built PREPEND sm_)
  list(APPEND built ptx_${newest})
  string(REPLACE ";" "," built "${built}")
  set(summary "${summary} cuda:${built}")
else()
  set(summary "${summary}; no CUDA module: nvcc found, the static CUDA runtime not")
endif()
