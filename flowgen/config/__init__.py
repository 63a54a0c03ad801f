"""From words and YAML files to models and data: files, the grammar of overrides, plain sentences, building, loading."""

from flowgen.config.building import build, build_data, build_model, build_model_and_data, check_fits_data, model_for
from flowgen.config.comparing import data_section, in_shape, of_the_same_images
from flowgen.config.files import conf_folder, flat, options, read_config, save_config, settings
from flowgen.config.loading import find_model, load_model, load_weights, model_of
from flowgen.config.resolvers import register_resolvers, trainer_here
from flowgen.config.sentences import no_such_setting, one_line, plain_error
from flowgen.config.words import check_words, in_grammar, name_folders, one_end, override, plain

__all__ = [
    "build",
    "build_data",
    "build_model",
    "build_model_and_data",
    "check_fits_data",
    "check_words",
    "conf_folder",
    "data_section",
    "find_model",
    "flat",
    "in_grammar",
    "in_shape",
    "load_model",
    "load_weights",
    "model_for",
    "model_of",
    "name_folders",
    "no_such_setting",
    "of_the_same_images",
    "one_end",
    "one_line",
    "options",
    "override",
    "plain",
    "plain_error",
    "read_config",
    "register_resolvers",
    "save_config",
    "settings",
    "trainer_here",
]
