/**
 * Owns the proof that the NEON kernel computes what the scalar one does, on machines that are not ARM: cross-compiled
 * and run under an emulator. On ARM itself oracle.test.ts covers it.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { arch, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const COMPILER = 'aarch64-linux-gnu-g++';
const TIMEOUT_MS = 300_000;
const isThere = (program: string) => spawnSync(program, ['--version']).status === 0;
const emulator = ['qemu-aarch64', 'qemu-aarch64-static'].find(isThere);
const canRun = arch() !== 'arm64' && emulator !== undefined && isThere(COMPILER);

describe('NEON under an emulator', () => {
  test.skipIf(!canRun)(
    `equals scalar over many shapes (needs ${COMPILER} and qemu-user; skipped without them and on ARM)`,
    () => {
      const native = fileURLToPath(new URL('../native/', import.meta.url));
      const driver = fileURLToPath(new URL('./native/simd-compare.cc', import.meta.url));
      const workDir = mkdtempSync(join(tmpdir(), 'simd-cross-'));
      try {
        const binary = join(workDir, 'simd-compare');
        const units = ['simd_neon', 'simd_scalar', 'cpu_dispatch', 'slab', 'step', 'attend_job'];
        const sources = [driver, ...units.map((unit) => join(native, `${unit}.cc`))];
        const flags = ['-std=c++17', '-O2', '-Wall', '-Wextra', '-Werror', '-static', '-pthread', `-I${native}`];
        const built = spawnSync(COMPILER, [...flags, ...sources, '-o', binary], { encoding: 'utf8' });
        expect(built.stderr).toBe('');
        const ran = spawnSync(emulator ?? '', [binary], { encoding: 'utf8', timeout: TIMEOUT_MS });
        expect(ran.stdout).toMatch(/^native-neon against scalar: 180 shapes/);
        expect(ran.status, ran.stdout + ran.stderr).toBe(0);
      } finally {
        rmSync(workDir, { recursive: true, force: true });
      }
    },
    2 * TIMEOUT_MS,
  );
});
