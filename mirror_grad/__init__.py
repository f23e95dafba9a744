"""Mirror Gradient and the multimodal recommenders it is tried on (Zhong et al., WWW 2024, on MMRec's protocol)."""
