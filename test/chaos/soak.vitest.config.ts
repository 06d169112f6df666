// Owns how `npm run soak` runs.
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: { include: ['test/chaos/soak.ts'], pool: 'forks', hookTimeout: 120_000, teardownTimeout: 10_000 },
});
