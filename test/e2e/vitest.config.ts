// Owns how the compose test runs: npm test -- --config test/e2e/vitest.config.ts
import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    root: fileURLToPath(new URL('../..', import.meta.url)),
    include: ['test/e2e/compose.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    testTimeout: 300_000,
    // Building the images the first time, and taking everything down.
    hookTimeout: 900_000,
  },
});
