/** The attention-shard process. */
import { runService } from '@lamina/runtime';
import { startAttentionShard } from './service.ts';

await runService('attention-shard', 'KV blocks and the attention over them', startAttentionShard);
