import { expect, test } from "vitest";

import { axisRuns, groupOf, shortBlock, stageOf } from "../../web/names.js";

test.each([
  ["unet:attn1.to_q", "q"],
  ["unet:attn2.to_k", "k"],
  ["unet:attn1.to_v", "v"],
  ["unet:attn1.to_out", "out"],
  ["unet:ff.net.proj", "ff"],
  ["unet:ff.net", "ff"],
  ["unet:conv1", "conv"],
  ["unet:conv_shortcut", "conv"],
  ["unet:downsamplers.conv", "conv"],
  ["unet:proj_in", "other"],
  ["unet:time_emb_proj", "other"],
  ["transformer:attn.add_q_proj", "q"],
  ["transformer:attn.add_k_proj", "k"],
  ["transformer:attn.to_add_out", "out"],
  ["transformer:ff_context.net.proj", "ff"],
  ["transformer:proj_mlp", "ff"],
  ["transformer:self_attn.q_proj", "q"],
  ["transformer:self_attn.output_proj", "out"],
  ["transformer:mlp.layer1", "ff"],
  ["transformer:feed_forward.w1", "ff"],
  ["transformer:ffn.net", "ff"],
  ["transformer:attn.to_qkv_mlp_proj", "other"],
  ["transformer:attention.qkv", "other"],
  ["text_encoder:self_attn.q_proj", "q"],
  ["text_encoder:self_attn.out_proj", "out"],
  ["text_encoder:mlp.fc1", "ff"],
  ["text_encoder_3:SelfAttention.o", "out"],
  ["text_encoder_3:SelfAttention.k", "k"],
  ["text_encoder_3:DenseReluDense.wi_0", "ff"],
])("%s is %s", (kind, group) => {
  expect(groupOf(kind)).toBe(group);
});

test.each([
  ["unet.down_blocks.1.attentions.0.transformer_blocks.3", "down 1", "down 1 0.3"],
  ["unet.mid_block.attentions.0.transformer_blocks.0", "mid", "mid 0.0"],
  ["unet.up_blocks.2.resnets.1", "up 2", "up 2 1"],
  ["transformer.transformer_blocks.12", "transformer_blocks", "transformer_blocks 12"],
  ["transformer.blocks.7", "blocks", "blocks 7"],
  ["unet", "unet", "unet"],
  ["text_encoder.text_model.encoder.layers.3", "text_encoder", "text_encoder 3"],
])("%s is of stage %s", (block, stage, short) => {
  expect(stageOf(block)).toBe(stage);
  expect(shortBlock(block)).toBe(short);
});

test("an axis has a run for each stage, from edge to edge", () => {
  const blocks = ["unet.down_blocks.0.attentions.0", "unet.down_blocks.0.attentions.1", "unet.mid_block.attentions.0"];
  expect(axisRuns(blocks)).toEqual([
    { name: "down 0", short: "D0", from: 0, to: 2 },
    { name: "mid", short: "M", from: 2, to: 3 },
  ]);
});
