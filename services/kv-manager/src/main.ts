/** The kv-manager process. */
import { runService } from '@lamina/runtime';
import { startKvManager } from './service.ts';

await runService('kv-manager', 'Block tables, placement and membership of the KV cache', startKvManager);
