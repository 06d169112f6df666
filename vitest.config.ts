// Owns how `npm test` runs: every test but the compose test, which has its own configuration in test/e2e.
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: [
      'packages/*/{src,test}/**/*.test.ts',
      'services/*/{src,test}/**/*.test.ts',
      'test/{structure,contract,synthetic,e2e}/**/*.test.ts',
    ],
    exclude: ['test/e2e/compose.test.ts', '**/node_modules/**', '**/dist/**'],
    pool: 'forks',
    // Tests start real servers and clusters; more at a time would only make each other's timings longer.
    maxWorkers: 2,
    testTimeout: 30_000,
    hookTimeout: 30_000,
    teardownTimeout: 10_000,
  },
});
