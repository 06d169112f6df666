// Owns how `npm run chaos` runs: one scenario after the other, each on a cluster of its own.
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/chaos/chaos.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    hookTimeout: 120_000,
    teardownTimeout: 10_000,
  },
});
