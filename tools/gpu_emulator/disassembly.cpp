// SPDX-License-Identifier: Apache-2.0
#include "disassembly.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "emulator.h"

namespace gpu_emulator {
namespace {

// The number after `label` in a line of -res-usage.
int64_t usage(const std::string& line, const std::string& label) {
  const size_t at = line.find(label);
  return at == std::string::npos ? 0 : std::stoll(line.substr(at + label.size()));
}

std::string quoted(const std::string& word) {
  std::string out = "'";
  for (const char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

}  // namespace

std::string output_of(const std::vector<std::string>& command) {
  std::string line;
  for (const std::string& word : command) line += quoted(word) + " ";
  FILE* pipe = popen((line + "2>/dev/null").c_str(), "r");
  if (pipe == nullptr) throw Fault("launch", "cannot start " + line);
  std::string out;
  char buffer[1 << 16];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.append(buffer, n);
  pclose(pipe);
  return out;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Fault("launch", "cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

Disassembly read_disassembly(const std::string& text, const std::string& kernel) {
  Disassembly found;
  std::istringstream in(text);
  bool inside = false, described = false;
  for (std::string line; std::getline(in, line);) {
    // " Function NAME:" before the numbers of -res-usage, "Function : NAME" before the code.
    if (line.find(" Function " + kernel + ":") != std::string::npos) {
      described = true;
      continue;
    }
    if (described && line.find(" REG:") != std::string::npos) {
      found.registers = static_cast<int>(usage(line, " REG:"));
      found.local = static_cast<uint32_t>(usage(line, " STACK:") + usage(line, " LOCAL:"));
      found.shared = static_cast<uint32_t>(usage(line, " SHARED:"));
      found.constant_bytes = usage(line, " CONSTANT[0]:");
    }
    described = false;
    if (const size_t at = line.find("Function : "); at != std::string::npos) {
      if (inside) break;
      inside = line.substr(at + 11, line.find_last_not_of(" \r") - at - 10) == kernel;
      continue;
    }
    if (!inside) continue;
    const size_t open = line.find_first_not_of(" \t");
    if (open == std::string::npos || line.compare(open, 2, "/*") != 0) continue;
    const size_t close = line.find("*/", open);
    const std::string first = line.substr(open + 2, close - open - 2);
    if (first.find("0x") != std::string::npos) {
      // The second half of an encoding has a line of its own.
      if (!found.lines.empty()) found.lines.back().high = std::stoull(first, nullptr, 16);
      continue;
    }
    const size_t end = line.find(';', close);
    if (end == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", close + 2);
    size_t last = line.find_last_not_of(" \t", end - 1);
    const size_t encoding = line.find("/* 0x", end);
    found.lines.push_back({static_cast<uint32_t>(std::stoul(first, nullptr, 16)), line.substr(begin, last - begin + 1),
                           encoding == std::string::npos ? 0 : std::stoull(line.substr(encoding + 3), nullptr, 16), 0});
  }
  if (found.lines.empty()) throw Fault("launch", "the code has no kernel " + kernel);
  return found;
}

std::string find_source_line(const std::string& path, const std::string& kernel, const std::string& cuobjdump,
                             uint32_t pc) {
  namespace fs = std::filesystem;
  const fs::path disassembler = fs::path(cuobjdump).parent_path() / "nvdisasm";
  if (path.empty() || !fs::exists(disassembler)) return "";
  std::string directory = (fs::temp_directory_path() / "gpu_emulator_XXXXXX").string();
  if (mkdtemp(directory.data()) == nullptr) return "";
  std::vector<fs::path> cubins{path};
  if (read_file(path).compare(0, 4, "\177ELF") != 0 || fs::path(path).extension() != ".cubin") {
    output_of({"sh", "-c", "cd \"$1\" && \"$2\" -xelf sm_90 \"$3\"", "sh", directory, cuobjdump,
               fs::absolute(path).string()});
    cubins.clear();
    for (const auto& entry : fs::directory_iterator(directory)) cubins.push_back(entry.path());
  }
  std::string found;
  for (const fs::path& cubin : cubins) {
    if (read_file(cubin).find(".text." + kernel) == std::string::npos) continue;
    std::istringstream in(output_of({disassembler.string(), "-g", "-c", cubin.string()}));
    std::string current;
    bool inside = false;
    for (std::string line; std::getline(in, line);) {
      if (line.find(".section") != std::string::npos) inside = line.find(".text." + kernel + ",") != std::string::npos;
      if (!inside) continue;
      if (const size_t at = line.find("//## File \""); at != std::string::npos) {
        const size_t end = line.find('"', at + 11), number = line.find("line ", end);
        current = line.substr(at + 11, end - at - 11) + ":" + std::to_string(std::atoi(line.c_str() + number + 5));
      } else if (const size_t open = line.find("/*");
                 open != std::string::npos && line.find(';') != std::string::npos) {
        if (std::strtoul(line.c_str() + open + 2, nullptr, 16) == pc) found = current;
      }
    }
  }
  fs::remove_all(directory);
  return found;
}

}  // namespace gpu_emulator
